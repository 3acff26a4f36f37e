"""GGUF files, written here as llama.cpp's converter writes them: rows of queries and keys in another order."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from ring_rl.lm.pretrained.gguf_in import GGUFFile, huggingface_name, split_halves
from ring_rl.lm.pretrained.parameter_names import PLACEMENTS

gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf library")

HEADER = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def permuted(weight, heads):
    """What llama.cpp's converter does to the rows of queries and keys (`LlamaModel.permute` there)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, llama, *, quantisation="F32", architecture="llama", tied=False, groups=True, **extra):
    """The committed model as a GGUF file; without `groups` every query head has keys and values of its own."""
    kind = gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, architecture)
    header = {key: value for key, value in HEADER.items() if groups or not key.endswith("head_count_kv")}
    for key, value in (header | extra).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 500.0)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, tensor in load_file(llama.folder / "model.safetensors").items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.astype(np.float32)
        if not groups and ("k_proj" in name or "v_proj" in name):
            values = values.reshape(2, -1, values.shape[1]).repeat(2, axis=0).reshape(-1, values.shape[1])
        if "q_proj" in name or "k_proj" in name:
            values = permuted(values, 2 if "k_proj" in name and groups else 4)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if values.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_the_same_model(llama, tmp_path):
    loaded = llama.load(write(tmp_path / "model.gguf", llama))
    np.testing.assert_equal(llama.weights(loaded.model), llama.weights(llama.whole.model))
    # The initial scale is the one thing that the file does not say, and transformers' usual one stands for it.
    assert loaded.config.embedding_scale == 0.02
    assert loaded.config.transformer == llama.whole.config.transformer
    assert loaded.tokenizer is None


def test_parts_of_quantised_tensors(llama, tmp_path):
    """A part read by itself, as a shard is, equals that part of the whole; 8 bits are within half a step."""
    path = write(tmp_path / "model.gguf", llama, quantisation="Q8_0")
    stored = load_file(llama.folder / "model.safetensors")
    with GGUFFile(path) as source:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
            whole = source.read(name, (slice(None), slice(None)))
            part = source.read(name, (slice(5, 23), slice(7, 50)))
            np.testing.assert_array_equal(part, whole[5:23, 7:50])
            exact = stored[name].astype(np.float32)
            assert 0 < np.abs(whole - exact).max() <= 0.51 * np.abs(exact).max() / 127


def test_a_sharded_load_of_a_file(llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama, quantisation="Q8_0")
    once, shared = llama.load(path), llama.load(path, llama.parallel(fsdp=2, tp=2))
    np.testing.assert_equal(llama.weights(shared.model), llama.weights(once.model))


def test_a_file_without_a_head_has_a_tied_one(llama, tmp_path):
    loaded = llama.load(write(tmp_path / "model.gguf", llama, tied=True))
    assert loaded.config.tied_embedding
    assert "vocabulary.head" not in llama.weights(loaded.model)


def test_a_file_that_says_nothing_of_key_value_heads_has_one_for_each_query_head(llama, tmp_path):
    loaded = llama.load(write(tmp_path / "model.gguf", llama, groups=False))
    assert loaded.config.transformer.key_value_heads == 4
    kernel = lambda model: llama.weights(model)["transformer.blocks.attention.key.kernel"]  # noqa: E731
    of_two = kernel(llama.whole.model).reshape(2, 64, 2, 16)
    np.testing.assert_array_equal(kernel(loaded.model).reshape(2, 64, 4, 16), of_two.repeat(2, axis=2))


def test_scaling_by_interpolation(llama, tmp_path):
    extra = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    scaling = llama.load(write(tmp_path / "model.gguf", llama, **extra)).config.transformer.rotary_scaling
    assert (scaling.name, scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "a model of architecture 'gemma'; only LLaMA's"),
        ({"expert_count": 8}, "a mixture of 8 experts"),
        ({"rope.dimension_count": 8}, "turns 8 dimensions of a head and not all"),
        ({"attention.head_count_kv": [2, 1]}, "another attention.head_count_kv in every layer"),
        ({"rope.scaling.type": "longrope"}, "'longrope', which is not supported"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 2.0}, r"holds rope\.scaling\.attn_factor"),
        ({"rope.scale_linear": 4.0}, r"holds rope\.scale_linear, which cannot be read"),
        ({"block_count": 3}, r"9 missing: model\.layers\.2"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(changes, message, llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama, **changes)
    with pytest.raises(ValueError, match=message):
        llama.load(path)


def test_files_that_are_not_whole(llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="cut off or no GGUF file"):
        llama.load(path)
    path.write_bytes(b"something else altogether")
    with pytest.raises(ValueError, match="cut off or no GGUF file"):
        llama.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*; name a \.gguf file"):
        llama.load(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (4, 16), (3, 8)])
def test_the_order_of_rows_is_undone(heads, head_dim):
    rows = np.arange(heads * head_dim)
    np.testing.assert_array_equal(permuted(rows[:, None], heads)[split_halves(len(rows), heads), 0], rows)


def test_every_tensor_of_a_llama_has_a_name():
    names = {name for placement in PLACEMENTS.values() for name in placement.tensors(1)}
    written = set()
    for name in names:
        theirs = name
        for ours, short in NAMES.items():
            theirs = theirs.replace(ours, short)
        written.add(huggingface_name(theirs))
    assert written == names
    assert huggingface_name("blk.0.attn_q.bias") == "blk.0.attn_q.bias"
