import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.nn.rotary_scaling import LinearScaling, Llama3Scaling, YarnScaling, rotary_frequencies

LINEAR = LinearScaling(name="linear", factor=4.0)
LLAMA3 = Llama3Scaling(
    name="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=64
)
YARN = YarnScaling(
    name="yarn", factor=16.0, original_positions=512, beta_fast=32.0, beta_slow=1.0, attention_factor=None
)
STEEP_YARN = YarnScaling(
    name="yarn", factor=4.0, original_positions=64, beta_fast=8.0, beta_slow=2.0, attention_factor=0.75
)
# What transformers 4.57.6 computes for heads of 16 dimensions, in float32.
PUBLISHED = [
    (
        LINEAR,
        1e4,
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
    (
        LLAMA3,
        5e5,
        [1.0, 0.07940301, 0.004700754, 0.0009115831, 0.0001767767, 3.428102e-05, 6.64787e-06, 1.289173e-06],
        1.0,
    ),
    (
        YARN,
        1e4,
        [1.0, 0.2421119, 0.053125, 0.009388013, 0.000625, 0.0001976424, 6.25e-05, 1.976424e-05],
        1.2772588722239782,
    ),
    (
        STEEP_YARN,
        1e4,
        [1.0, 0.1976424, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        0.75,
    ),
]


@pytest.mark.parametrize(
    ("scaling", "base", "frequencies", "magnitude"), PUBLISHED, ids=lambda x: getattr(x, "name", "")
)
def test_frequencies_are_those_of_published_models(scaling, base, frequencies, magnitude):
    got = rotary_frequencies(rotary_dim=16, base=base, scaling=scaling)
    np.testing.assert_allclose(got.per_position, frequencies, rtol=1e-6)
    assert got.magnitude == pytest.approx(magnitude)


@given(
    rotary_dim=st.sampled_from([8, 64, 128]),
    base=st.floats(1e3, 1e9),
    factor=st.floats(1.0, 64.0),
    original=st.integers(256, 8192),
)
def test_frequencies_are_those_of_transformers(rotary_dim, base, factor, original):
    """Of the library itself, where it is installed."""
    rope = pytest.importorskip("transformers.modeling_rope_utils", reason="compares with transformers")
    pytest.importorskip("torch", reason="transformers computes frequencies with torch")
    from transformers import LlamaConfig

    shared = {"factor": factor, "original_max_position_embeddings": original}
    cases = [
        (LinearScaling(name="linear", factor=factor), {"rope_type": "linear", "factor": factor}),
        (
            Llama3Scaling(
                name="llama3",
                factor=factor,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
                original_positions=original,
            ),
            {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **shared},
        ),
        (
            YarnScaling(
                name="yarn",
                factor=factor,
                original_positions=original,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=None,
            ),
            {"rope_type": "yarn", **shared},
        ),
    ]
    for scaling, published in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LlamaConfig(
                hidden_size=rotary_dim,
                num_attention_heads=1,
                rope_theta=base,
                rope_scaling=published,
                max_position_embeddings=int(original * factor),
            )
            frequencies, magnitude = rope.ROPE_INIT_FUNCTIONS[published["rope_type"]](config, "cpu")
        got = rotary_frequencies(rotary_dim=rotary_dim, base=base, scaling=scaling)
        np.testing.assert_allclose(got.per_position, frequencies.numpy(), rtol=2e-5)
        assert got.magnitude == pytest.approx(magnitude)


def test_a_factor_of_one_scales_nothing():
    plain = rotary_frequencies(rotary_dim=16, base=1e4, scaling=None)
    for scaling in (
        LinearScaling(name="linear", factor=1.0),
        Llama3Scaling(
            name="llama3", factor=1.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=64
        ),
        YarnScaling(
            name="yarn", factor=1.0, original_positions=64, beta_fast=32.0, beta_slow=1.0, attention_factor=None
        ),
    ):
        got = rotary_frequencies(rotary_dim=16, base=1e4, scaling=scaling)
        np.testing.assert_allclose(got.per_position, plain.per_position, rtol=1e-12)
        assert got.magnitude == plain.magnitude == 1


def test_impossible_scalings_name_the_rule():
    with pytest.raises(ValueError, match=r"rotary_scaling.factor must be at least 1, got 0.5"):
        LinearScaling(name="linear", factor=0.5)
    with pytest.raises(ValueError, match=r"0 < low_frequency_factor < high_frequency_factor, got 4.0 and 1.0"):
        Llama3Scaling(
            name="llama3", factor=8.0, low_frequency_factor=4.0, high_frequency_factor=1.0, original_positions=64
        )
    yarn = {"name": "yarn", "factor": 4.0, "original_positions": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    with pytest.raises(ValueError, match=r"attention_factor must be positive, got 0.0; null derives it"):
        YarnScaling(**yarn, attention_factor=0.0)
    with pytest.raises(ValueError, match=r"0 < beta_slow < beta_fast, got 40.0 and 32.0"):
        YarnScaling(**(yarn | {"beta_slow": 40.0}), attention_factor=None)
    with pytest.raises(ValueError, match=r"original_positions must be at least 1, got 0"):
        YarnScaling(**(yarn | {"original_positions": 0}), attention_factor=None)
