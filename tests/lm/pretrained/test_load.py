"""A LLaMA that transformers saved computes here what it computes there, on whatever mesh it is loaded."""

import math

import numpy as np
import pytest

from ring_rl.lm.pretrained.safetensors_in import SafetensorsFolder


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
def test_logits_are_those_of_transformers(scaling, llama, copied):
    loaded = llama.load(copied(rope_scaling=llama.scalings[scaling]))
    computed = llama.compute_logits(loaded, llama.tokens)
    np.testing.assert_allclose(computed, llama.logits[scaling], rtol=1e-4, atol=1e-4)
    # The scalings tell apart what they are tested by.
    others = [values for name, values in llama.logits.items() if name != scaling]
    assert min(np.abs(computed - other).max() for other in others) > 1e-2


def test_transformers_5_writes_the_rotary_keys_elsewhere(llama, copied):
    yarn = llama.scalings["yarn"]
    old = llama.load(copied(rope_scaling=yarn)).config
    new = llama.load(copied(rope_scaling=None, rope_theta=None, rope_parameters=yarn | {"rope_theta": 500.0})).config
    assert old == new
    assert new.transformer.rotary_base == 500.0
    assert new.transformer.rotary_scaling.name == "yarn"


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 4}, {"tp": 2, "sp": 2}, {"sp": 8}], ids=str)
def test_a_part_is_read_once_for_all_devices_that_hold_it(sizes, llama, monkeypatch):
    """Whatever the mesh, as many numbers are read as the model has, and no more at a time than a device holds."""
    read = []
    plain_read = SafetensorsFolder.read

    def counted(self, name, index):
        values = plain_read(self, name, index)
        read.append(values.size)
        return values

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    around = llama.parallel(**sizes)
    model = llama.load(llama.folder, around).model
    whole = llama.weights(llama.whole.model)
    np.testing.assert_equal(llama.weights(model), whole)
    assert sum(read) == sum(values.size for values in whole.values())
    split = sizes.get("fsdp", 1) * sizes.get("tp", 1)
    largest = max(math.prod(values.shape[-2:]) for values in whole.values())
    assert max(read) == largest // split
    query = model.transformer.blocks.attention.query.kernel.get_value()
    assert query.addressable_shards[0].data.size == query.size // split


def test_weights_that_are_not_asked_for_are_not_read(llama, monkeypatch):
    monkeypatch.delattr(SafetensorsFolder, "read")
    described = llama.load(llama.folder, weights=False)
    assert described.config == llama.whole.config
    assert described.tokenizer is not None or llama.whole.tokenizer is None


def test_the_ring_may_share_the_weights(llama):
    around = llama.parallel(sp=4, weight_axes=("fsdp", "sp"))
    model = llama.load(llama.folder, around).model
    query = model.transformer.blocks.attention.query.kernel.get_value()
    assert query.addressable_shards[0].data.size == query.size // 4
    np.testing.assert_equal(llama.weights(model), llama.weights(llama.whole.model))


def test_overrides_change_what_is_computed(llama):
    from dataclasses import replace

    from ring_rl.nn.rotary_scaling import LinearScaling

    scaling = LinearScaling(name="linear", factor=4.0)
    overrides = replace(llama.overrides, rotary_base=9e4, rotary_scaling=scaling, feed_forward_chunks=2)
    transformer = llama.load(llama.folder, overrides=overrides, compute_dtype="bfloat16").config.transformer
    assert (transformer.rotary_base, transformer.rotary_scaling) == (9e4, scaling)
    assert (transformer.feed_forward_chunks, transformer.compute_dtype) == (2, "bfloat16")
    assert llama.whole.config.transformer.rotary_base == 500.0
    assert llama.whole.config.trained_positions == 64


def test_a_folder_without_a_tokenizer_has_none(llama):
    assert llama.whole.tokenizer is None
    assert llama.whole.origin == {"path": str(llama.folder)}


@pytest.mark.parametrize(("ids", "fits"), [(96, True), (97, False), (95, False)])
def test_a_tokenizer_must_fit_the_vocabulary(ids, fits, llama, tmp_path):
    """95 of 96 rows is more padding than 1%; ids without a row are never allowed."""
    from ring_rl.lm.tokenizer.load import WordTokenizerConfig

    words = tmp_path / "words.txt"
    words.write_text("".join(f"word{index}\n" for index in range(ids)))
    chosen = WordTokenizerConfig(name="words", path=words)
    if fits:
        assert llama.load(llama.folder, tokenizer=chosen).tokenizer.vocabulary_size == ids
    else:
        with pytest.raises(ValueError, match=rf"has {ids} ids, but the model embeds 96 tokens.*use the tokenizer"):
            llama.load(llama.folder, tokenizer=chosen)


def test_a_path_to_nothing(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; name a model's folder"):
        llama.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        llama.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes((llama.folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"config\.json is no valid JSON"):
        llama.load(tmp_path)
