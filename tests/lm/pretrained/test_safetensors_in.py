"""Weights in one file or several, and folders that are not whole."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ring_rl.lm.pretrained.safetensors_in import INDEX_FILE, SafetensorsFolder


def in_shards(folder, count=3):
    """Splits the folder's one file; the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number, names in enumerate(np.array_split(sorted(tensors), count), start=1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        places |= dict.fromkeys(map(str, names), file)
    index = {"metadata": {}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return index


def test_shards_are_one_model(llama, copied):
    folder = copied()
    in_shards(folder)
    np.testing.assert_equal(llama.weights(llama.load(folder).model), llama.weights(llama.whole.model))


def test_one_file_goes_before_shards_as_in_transformers(llama, copied):
    folder = copied()
    in_shards(folder)
    others = {name: 2 * values for name, values in load_file(llama.folder / "model.safetensors").items()}
    save_file(others, folder / "model.safetensors")
    with SafetensorsFolder(folder) as source:
        np.testing.assert_array_equal(
            source.read("model.norm.weight", (slice(None),)), others["model.norm.weight"].astype(np.float32)
        )


def test_parts_are_read_in_float32(llama):
    whole = load_file(llama.folder / "model.safetensors")
    with SafetensorsFolder(llama.folder) as source:
        name = "model.layers.1.mlp.down_proj.weight"
        part = source.read(name, (slice(3, 9), slice(10, 20)))
        assert part.dtype == np.float32
        assert whole[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(part, whole[name][3:9, 10:20].astype(np.float32))
        assert source.shapes[name] == (64, 96)


def test_missing_shards_are_all_named(llama, copied):
    folder = copied()
    in_shards(folder)
    for number in (1, 3):
        (folder / f"model-0000{number}-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of its 3 shards: model-00001\S+, model-00003"):
        llama.load(folder)


def test_an_index_of_another_revision(llama, copied):
    folder = copied()
    index = in_shards(folder)
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"1 tensors .*not in their shards: model\.extra\.weight; download"):
        llama.load(folder)
    (folder / INDEX_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        llama.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, .*git lfs pull"),
        (b"", "cut off or no safetensors file"),
        (..., "cut off or no safetensors file"),
    ],
)
def test_a_file_that_is_not_whole(content, message, llama, copied):
    file = copied() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is ... else content)
    with pytest.raises(ValueError, match=message):
        llama.load(file.parent)


def test_weights_of_another_kind(llama, copied):
    folder = copied()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"PyTorch's pickled weights; save them as safetensors"):
        llama.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index"):
        llama.load(folder)


def test_quantised_tensors_are_refused(llama, copied):
    folder = copied()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: np.zeros(tensors[name].shape, np.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 tensors .* are not floating-point numbers \(I8\): {name}"):
        llama.load(folder)
