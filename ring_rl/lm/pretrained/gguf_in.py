"""Weights in a GGUF file of llama.cpp, most often quantised: dequantised as they are read.

llama.cpp turns neighbouring dimensions of a head by rotary positions, (0, 1), (2, 3), ..., where Hugging Face and this
library turn the two halves, (0, D/2), (1, D/2 + 1), ...; so its converter reorders the rows of the query and key
projections, and the order is undone here. A model read without that is not broken, only worse.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ring_rl.lm.pretrained.tensor_source import TensorSource
from ring_rl.typing import Float32, Int

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# The published keys of a LLaMA that mean the same in a config.json.
_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_SCALING_KEYS = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
}


class GGUFFile(TensorSource):
    """The tensors of a GGUF file under their Hugging Face names, and what its header says about the model.

    Attributes:
        path: The file.
        header: What it says about the model, by llama.cpp's names.
        has_tokenizer: Whether it holds one.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: `gguf` is not installed.
        ValueError: It is cut off, is one of several parts, or holds a quantisation that `gguf` cannot read.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; name a .gguf file")
        self.path = path
        reader = _opened(path)
        # The tokenizer's tens of thousands of strings are nothing that weights need.
        self.header: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")
        }
        self.has_tokenizer = "tokenizer.ggml.tokens" in reader.fields
        if self.header.get("split.count", 1) > 1:
            raise ValueError(
                f"{path} is one of {self.header['split.count']} parts; join them first (llama-gguf-split --merge)"
            )
        self._tensors = {huggingface_name(tensor.name): tensor for tensor in reader.tensors}
        _check_types(path, self._tensors)

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    @property
    def description(self) -> str:
        """The file."""
        return str(self.path)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As Hugging Face counts dimensions, which is the reverse of GGUF's order."""
        return {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        """Rows are dequantised as far as they are asked for, and whole: a block lies within a row."""
        from gguf.quants import dequantize

        tensor, rows = self._tensors[name], index[0]
        projection = name.split(".")[-2]
        if projection in ("q_proj", "k_proj"):
            heads = self.config["num_attention_heads"]
            if projection == "k_proj":
                # Files of models without groups need not say it.
                heads = self.config.get("num_key_value_heads", heads)
            rows = split_halves(len(tensor.data), heads)[rows]
        values = dequantize(tensor.data[rows], tensor.tensor_type)
        return np.asarray(values, np.float32)[(slice(None), *index[1:])]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What the header says, in the words of a `config.json`.

        Raises:
            ValueError: It says something that a `config.json` of a plain LLaMA could not.
        """
        architecture = self.header.get("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"{self.path} holds a model of architecture {architecture!r}; only LLaMA's ('llama') can be loaded"
            )
        said = {
            name.removeprefix("llama."): _shortest(value)
            for name, value in self.header.items()
            if name.startswith("llama.")
        }
        config = {theirs: said[ours] for ours, theirs in _CONFIG_KEYS.items() if ours in said}
        config |= {"model_type": "llama", "tie_word_embeddings": "lm_head.weight" not in self._tensors}
        if "model.embed_tokens.weight" in self._tensors:
            config["vocab_size"] = self.shapes["model.embed_tokens.weight"][0]
        self._refuse_the_rest(said, config)
        if said.get("rope.scaling.type", "none") != "none":
            scaling = {theirs: said.get(f"rope.scaling.{ours}") for ours, theirs in _SCALING_KEYS.items()}
            config["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}
        return config

    def _refuse_the_rest(self, said: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        listed = [key for key, value in said.items() if isinstance(value, list)]
        if listed:
            raise ValueError(f"{self.path} has another {', '.join(listed)} in every layer, which is not supported")
        if said.get("expert_count", 0):
            raise ValueError(f"{self.path} is a mixture of {said['expert_count']} experts, which is not supported")
        turning, width, heads = (
            said.get("rope.dimension_count"),
            config.get("hidden_size"),
            config.get("num_attention_heads"),
        )
        if turning and width and heads and turning != config.get("head_dim", width // heads):
            raise ValueError(f"{self.path} turns {turning} dimensions of a head and not all, which is not supported")
        known = {f"rope.scaling.{key}" for key in (*_SCALING_KEYS, "finetuned")}
        # Before there were kinds of scaling, files said "rope.scale_linear".
        unknown = sorted(key for key in said if key.startswith("rope.scal") and key not in known)
        if unknown or "rope_freqs.weight" in self._tensors:
            what = ", ".join(unknown) or "rope_freqs.weight, the factors of llama3's rotary scaling"
            raise ValueError(
                f"{self.path} holds {what}, which cannot be read from GGUF files; load the model's safetensors"
            )


def huggingface_name(name: str) -> str:
    """The Hugging Face name of a LLaMA's tensor; another tensor's stays as it is."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _NAMES.get(name, name)
    inner = _LAYER_NAMES.get(layer[2])
    return name if inner is None else f"model.layers.{layer[1]}.{inner}"


def split_halves(rows: int, heads: int) -> Int[np.ndarray, " rows"]:
    """Where each row of a projection in Hugging Face's order stands in llama.cpp's.

    Within a head of D dimensions, row j D/2 + i of the former (half j) is row 2 i + j of the latter.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _shortest(value: Any) -> Any:
    """A float32 of the header as the number that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _opened(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"GGUF files need the gguf library: pip install 'ring_rl[lm]' ({error})") from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is cut off or no GGUF file ({error}); download it again") from None


def _check_types(path: Path, tensors: Mapping[str, Any]) -> None:
    from gguf.quants import dequantize

    unreadable = set()
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.items():
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            unreadable.add(kind.name)
    if unreadable:
        raise ValueError(f"{path} holds {', '.join(sorted(unreadable))} numbers, which the gguf library cannot read")
