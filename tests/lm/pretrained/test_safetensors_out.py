"""Models go out as transformers reads them, and come back the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.lm.model import LanguageModel
from ring_rl.lm.pretrained.placed import transfer_progress
from ring_rl.lm.pretrained.safetensors_out import save_pretrained
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.nn.rotary_scaling import YarnScaling

PLENTY = 10**9
YARN = YarnScaling(name="yarn", factor=4.0, original_positions=16, beta_fast=32.0, beta_slow=1.0, attention_factor=None)


@pytest.fixture(scope="module")
def model(llama):
    """Another random model than the committed one: tied, in the middle of a schedule of longer contexts."""
    config = llama.whole.config
    transformer = dataclasses.replace(config.transformer, rotary_scaling=YARN, rotary_base=3e4)
    config = dataclasses.replace(config, tied_embedding=True, transformer=transformer, trained_positions=128)
    return LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("shard_bytes", "files"), [(PLENTY, 1), (60_000, 6), (1, 20)])
def test_a_model_goes_out_and_comes_back(shard_bytes, files, llama, model, tmp_path):
    save_pretrained(model, tmp_path / "out", tokenizer=None, dtype="float32", shard_bytes=shard_bytes)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == files
    assert files == 20 or max(shard.stat().st_size for shard in shards) < shard_bytes + 4096
    loaded = llama.load(tmp_path / "out")
    assert loaded.config == model.config
    np.testing.assert_equal(llama.weights(loaded.model), llama.weights(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_loaded_model_goes_out_as_it_came(llama, tmp_path):
    """From a mesh that shares the weights, bfloat16 as stored: the same file, but for the order of tensors."""
    from safetensors.numpy import load_file

    loaded = llama.load(llama.folder, llama.parallel(fsdp=2, tp=2))
    save_pretrained(loaded.model, tmp_path / "out", tokenizer=None, dtype="bfloat16", shard_bytes=PLENTY)
    written, read = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama.folder / "model.safetensors")
    assert written.keys() == read.keys()
    for name, values in read.items():
        assert written[name].dtype == values.dtype
        np.testing.assert_array_equal(written[name], values)


def test_nothing_is_overwritten(llama, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        save_pretrained(model, out, tokenizer=None, dtype="float32", shard_bytes=PLENTY)
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_pretrained(model, tmp_path / "a" / "b", tokenizer=None, dtype="float32", shard_bytes=PLENTY)
    with pytest.raises(ValueError, match="transformers has no tokenizer of the kind 'bytes'"):
        save_pretrained(model, tmp_path / "other", tokenizer=ByteTokenizer(), dtype="float32", shard_bytes=PLENTY)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_crash_leaves_nothing_behind(llama, model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "out", tokenizer=None, dtype="float32", shard_bytes=PLENTY)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_again_does_not_go_out(llama, model, tmp_path):
    def written(model, dtype):
        save_pretrained(model, tmp_path / "out", tokenizer=None, dtype=dtype, shard_bytes=PLENTY)

    untrained = nnx.clone(model)
    untrained.config = dataclasses.replace(model.config, trained_positions=0)
    with pytest.raises(ValueError, match="has trained_positions=0; train it"):
        written(untrained, "float32")
    large = nnx.clone(model)
    large.transformer.final_norm.scale[...] = large.transformer.final_norm.scale[...].at[3].set(-1e5)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds a weight of magnitude 100000, .* use dtype=bfl"):
        written(large, "float16")
    assert not list(tmp_path.iterdir())
    written(large, "bfloat16")
    assert llama.weights(llama.load(tmp_path / "out").model)["transformer.final_norm.scale"][3] == -99840.0


def test_the_bar_ends_where_the_weights_do(model, tmp_path, monkeypatch):
    with transfer_progress() as progress:
        monkeypatch.setattr("ring_rl.lm.pretrained.safetensors_out.transfer_progress", lambda: progress)
        save_pretrained(model, tmp_path / "out", tokenizer=None, dtype="bfloat16", shard_bytes=60_000)
        (bar,) = progress.tasks
    assert bar.completed == bar.total == 2 * sum(each.size for each in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_a_tokenizer_goes_along(llama, model, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers need their library")
    from ring_rl.lm.tokenizer.huggingface import HuggingFaceTokenizer

    words = {f"w{index}": index for index in range(94)} | {"<s>": 94, "</s>": 95}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = HuggingFaceTokenizer(backend.to_str(), bos_id=94, eos_id=95)
    save_pretrained(model, tmp_path / "out", tokenizer=tokenizer, dtype="float32", shard_bytes=PLENTY)
    back = llama.load(tmp_path / "out").tokenizer
    assert back.encode("w3 w93").tolist() == [3, 93]
    assert (back.bos_id, back.eos_id) == (94, 95)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


def test_transformers_loads_what_is_written(llama, model, tmp_path):
    torch = pytest.importorskip("torch", reason="asks transformers itself, which needs torch")
    transformers = pytest.importorskip("transformers", reason="asks transformers itself")
    save_pretrained(model, tmp_path / "out", tokenizer=None, dtype="float32", shard_bytes=60_000)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        expected = theirs.float().eval()(torch.from_numpy(llama.tokens).long()).logits.numpy()
    computed = llama.compute_logits(llama.load(tmp_path / "out"), llama.tokens)
    np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.01
