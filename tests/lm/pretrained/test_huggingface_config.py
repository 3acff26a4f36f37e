"""What a config.json may say, and what is refused by name."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.pretrained.huggingface_config import config_json, language_model_config
from ring_rl.nn.rotary_scaling import LinearScaling, Llama3Scaling, YarnScaling


def read(llama, mapping):
    return language_model_config(mapping, where="config.json", compute_dtype="float32", overrides=llama.overrides)


def changed(llama, **changes):
    mapping = llama.config | changes
    return read(llama, {key: value for key, value in mapping.items() if value is not ...})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, r"type 'mistral' \(MistralForCausalLM\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "asks for attention_bias=True, which is not supported; supported is .*=False"),
        ({"mlp_bias": True, "hidden_act": "gelu"}, "hidden_act='gelu', mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": ..., "hidden_size": ...}, "lacks hidden_size, vocab_size"),
        ({"head_dim": ..., "num_attention_heads": 5}, "hidden_size=64 is no multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "query_heads=4 must be a multiple of key_value_heads=3"),
        ({"vocab_size": "96", "hidden_size": 0}, "has hidden_size=0, vocab_size='96', which must be whole numbers"),
        ({"rms_norm_eps": "small"}, "norm_epsilon' must be a float"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic', which is not supported; supported are"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks factor"),
        ({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}, "turns a share of 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "odd": 1}}, "'linear' has odd"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=false"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(changes, message, llama):
    with pytest.raises(ValueError, match=message) as refused:
        changed(llama, **changes)
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_absent_keys_mean_what_transformers_takes_them_for(llama):
    absent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    config = changed(llama, **dict.fromkeys(absent, ...))
    transformer = config.transformer
    assert (transformer.key_value_heads, transformer.head_dim) == (4, 16)
    assert (transformer.norm_epsilon, transformer.rotary_base) == (1e-6, 10000.0)
    assert not config.tied_embedding


def test_yarn_of_two_scales_has_their_quotient(llama):
    """As DeepSeek writes it: (0.1 mscale ln f + 1) / (0.1 mscale_all_dim ln f + 1)."""
    yarn = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = changed(llama, rope_scaling=yarn).transformer.rotary_scaling
    assert scaling.attention_factor == pytest.approx(1.1386294361 / 1.0693147181)
    # Without an original context it is the whole one.
    assert scaling.original_positions == 64


def test_yarn_keys_that_are_null_are_absent(llama):
    given = {"rope_type": "yarn", "factor": 4.0}
    nulls = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "original_max_position_embeddings"))
    scaling = changed(llama, rope_scaling=given | nulls).transformer.rotary_scaling
    assert scaling == changed(llama, rope_scaling=given).transformer.rotary_scaling
    assert (scaling.beta_fast, scaling.beta_slow, scaling.original_positions) == (32.0, 1.0, 64)
    with pytest.raises(ValueError, match="'yarn' lacks factor"):
        changed(llama, rope_scaling=given | {"factor": None})


factors = st.floats(1.0, 64.0)
positions = st.integers(1, 10**6)
scalings = st.one_of(
    st.none(),
    st.builds(LinearScaling, name=st.just("linear"), factor=factors),
    st.builds(
        Llama3Scaling,
        name=st.just("llama3"),
        factor=factors,
        low_frequency_factor=st.floats(0.5, 1.0),
        high_frequency_factor=st.floats(2.0, 8.0),
        original_positions=positions,
    ),
    st.builds(
        YarnScaling,
        name=st.just("yarn"),
        factor=factors,
        original_positions=positions,
        beta_fast=st.floats(8.0, 64.0),
        beta_slow=st.floats(0.5, 4.0),
        attention_factor=st.one_of(st.none(), st.floats(0.5, 2.0)),
    ),
)


@given(scaling=scalings, base=st.floats(100.0, 1e9), tied=st.booleans(), version=st.sampled_from([4, 5]))
def test_a_configuration_goes_out_and_comes_back(llama, scaling, base, tied, version):
    plain = llama.whole.config
    transformer = dataclasses.replace(plain.transformer, rotary_scaling=scaling, rotary_base=base)
    config = dataclasses.replace(plain, transformer=transformer, tied_embedding=tied)
    mapping = config_json(config, dtype="bfloat16")
    dropped = ("rope_parameters",) if version == 4 else ("rope_theta", "rope_scaling")
    assert read(llama, {key: value for key, value in mapping.items() if key not in dropped}) == config


def test_what_a_llama_cannot_be_is_not_written(llama):
    transformer = dataclasses.replace(
        llama.whole.config.transformer, feed_forward="none", attention_window=8, rotary_fraction=0.5
    )
    config = dataclasses.replace(llama.whole.config, transformer=transformer)
    with pytest.raises(ValueError, match=r"feed_forward=none, .*rotary_fraction=0\.5, .*attention_window=8"):
        config_json(config, dtype="float32")
