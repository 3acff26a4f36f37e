"""Every parameter has its tensor; what does not fit stands in one message."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ring_rl.lm.pretrained.parameter_names import PLACEMENTS
from ring_rl.lm.pretrained.placed import parameter_shapes


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_place_and_every_place_a_parameter(tied, llama):
    config = dataclasses.replace(llama.whole.config, tied_embedding=tied)
    left_out = {("vocabulary", "head")} if tied else set()
    assert set(parameter_shapes(config)) == set(PLACEMENTS) - left_out


def test_all_that_does_not_fit_is_in_one_message(llama, copied):
    folder = copied()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit the model") as refused:
        llama.load(folder)
    message = str(refused.value)
    assert "2 missing: model.layers.1.self_attn.q_proj.weight, model.norm.weight" in message
    assert "1 of another shape: lm_head.weight is [95, 64], the configuration says [96, 64]" in message
    assert "1 not part of a LLaMA: model.layers.0.self_attn.q_proj.bias" in message
    assert "\n" not in message


def test_another_number_of_layers(llama, copied):
    with pytest.raises(ValueError, match=r"9 missing: model\.layers\.2\.input_layernorm.* and 1 more"):
        llama.load(copied(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"9 not part of a LLaMA: model\.layers\.1\."):
        llama.load(copied(num_hidden_layers=1))


def test_what_old_checkpoints_hold_besides_is_passed_over(llama, copied):
    """Rotary frequencies, and a head beside an embedding that is declared to be the head."""
    folder = copied(tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    loaded = llama.load(folder)
    assert loaded.config.tied_embedding
    np.testing.assert_array_equal(
        llama.weights(loaded.model)["vocabulary.embedding"],
        llama.weights(llama.whole.model)["vocabulary.embedding"],
    )
