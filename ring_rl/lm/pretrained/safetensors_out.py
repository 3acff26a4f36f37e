"""A model as Hugging Face's transformers loads it: `config.json`, safetensors, a tokenizer."""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from ring_rl.lm.model import LanguageModel
from ring_rl.lm.pretrained.huggingface_config import config_json
from ring_rl.lm.pretrained.parameter_names import PLACEMENTS, ParameterPath
from ring_rl.lm.pretrained.placed import transfer_progress
from ring_rl.lm.pretrained.safetensors_in import INDEX_FILE, SINGLE_FILE, import_safetensors
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.typing import Array

StoredType = Literal["float32", "bfloat16", "float16"]
_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def save_pretrained(
    model: LanguageModel,
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: StoredType,
    shard_bytes: int,
) -> None:
    """Writes the model into a new folder, which is there in full or not at all.

    Args:
        model: Of plain LLaMA blocks. Of its weights, one shard at a time is in host memory.
        folder: Is made; its parent must exist.
        tokenizer: The model's own, of Hugging Face's or SentencePiece's kind; None writes none.
        dtype: Of the stored weights; bfloat16 rounds to 8 bits.
        shard_bytes: Most that one file holds, if its tensors are smaller than that.

    Raises:
        FileExistsError: The folder exists and holds something.
        FileNotFoundError: Its parent does not exist.
        ImportError: `safetensors` is not installed.
        ValueError: A LLaMA of transformers could not be that model, the tokenizer is none that transformers has, a
            weight is beyond what `dtype` holds, or other processes hold a part of the weights.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}; 5e9 is usual")
    config = config_json(model.config, dtype=dtype)
    files = {} if tokenizer is None else _tokenizer_files(tokenizer)
    if tokenizer is not None:
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    check_export(folder)
    parameters = _parameters(model)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_weights(unfinished, parameters, dtype=dtype, shard_bytes=shard_bytes)
        for name, content in {"config.json": _as_json(config), **files}.items():
            (unfinished / name).write_bytes(content)
        unfinished.chmod(0o755)
        # An empty folder of that name gives way.
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_export(folder: Path) -> None:
    """Raises FileExistsError if the folder holds something, FileNotFoundError if there is nowhere to make it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not overwritten; move it away or choose another name")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.parent} to write {folder.name} into; make it first")


def _parameters(model: LanguageModel) -> dict[ParameterPath, Array]:
    parameters: dict[ParameterPath, Array] = {
        tuple(map(str, path)): parameter.get_value()
        for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    if not all(array.is_fully_addressable for array in parameters.values()):
        raise ValueError(
            "other processes hold a part of the weights; export the run's checkpoint from a single process"
        )
    return parameters


def _write_weights(
    folder: Path, parameters: Mapping[ParameterPath, Array], *, dtype: StoredType, shard_bytes: int
) -> None:
    save_file = import_safetensors().numpy.save_file
    shards = list(_shards(parameters, itemsize=np.dtype(_TYPES[dtype]).itemsize, shard_bytes=shard_bytes))
    places: dict[str, str] = {}
    total = sum(array.size for array in parameters.values()) * np.dtype(_TYPES[dtype]).itemsize
    with transfer_progress() as progress:
        bar = progress.add_task("writing weights", total=total)
        for number, names in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for name, path, layer in names:
                tensors[name] = _rounded(_tensor(parameters[path], path, layer), name, dtype)
                progress.advance(bar, tensors[name].nbytes)
            # transformers asks which framework wrote the file, and knows only its own three.
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)
            places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_FILE).write_bytes(_as_json(index))


# The name of a tensor, the parameter it is of, and which of the parameter's layers.
_Tensor = tuple[str, ParameterPath, int]


def _shards(
    parameters: Mapping[ParameterPath, Array], *, itemsize: int, shard_bytes: int
) -> Iterator[Sequence[_Tensor]]:
    """Tensors that go into one file together."""
    shard: list[_Tensor] = []
    filled = 0
    for path, array in parameters.items():
        names = PLACEMENTS[path].tensors(array.shape[0])
        size = array.size // len(names) * itemsize
        for layer, name in enumerate(names):
            if shard and filled + size > shard_bytes:
                yield shard
                shard, filled = [], 0
            shard.append((name, path, layer))
            filled += size
    yield shard


def _tensor(array: Array, path: ParameterPath, layer: int) -> np.ndarray:
    placement = PLACEMENTS[path]
    values = jax.device_get(array[layer] if placement.stacked else array)
    # What is written is the memory itself, so a transposed view would not do.
    return np.ascontiguousarray(values.T if placement.transposed else values)


def _rounded(values: np.ndarray, name: str, dtype: StoredType) -> np.ndarray:
    largest = np.finfo(np.float16).max
    if dtype == "float16" and (beyond := np.abs(values[np.isfinite(values)]).max(initial=0.0)) > largest:
        raise ValueError(
            f"{name} holds a weight of magnitude {beyond:g}, and float16 ends at {largest:g}; use dtype=bfloat16 or "
            "float32"
        )
    return values.astype(_TYPES[dtype])


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    mapping = tokenizer.to_mapping()
    match mapping["name"]:
        case "huggingface":
            special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
            settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
            backend = json.loads(mapping["json"])
            settings |= {key: _token(backend, index) for key, index in special.items() if index is not None}
            return {"tokenizer.json": mapping["json"].encode(), "tokenizer_config.json": _as_json(settings)}
        case "sentencepiece":
            settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
            return {
                "tokenizer.model": base64.b64decode(mapping["model_base64"]),
                "tokenizer_config.json": _as_json(settings),
            }
        case other:
            raise ValueError(
                f"transformers has no tokenizer of the kind {other!r}; export the weights alone (with_tokenizer=false)"
            )


def _token(backend: Mapping[str, Any], index: int) -> str | None:
    """The text of an id in a `tokenizer.json`."""
    for added in backend.get("added_tokens", ()):
        if added["id"] == index:
            return added["content"]
    vocabulary = backend["model"].get("vocab", {})
    if isinstance(vocabulary, Mapping):
        return next((text for text, each in vocabulary.items() if each == index), None)
    return vocabulary[index][0] if index < len(vocabulary) else None


def _as_json(mapping: Mapping[str, Any]) -> bytes:
    return (json.dumps(mapping, indent=2, ensure_ascii=False) + "\n").encode()
