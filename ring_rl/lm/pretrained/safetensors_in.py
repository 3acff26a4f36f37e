"""Weights in safetensors files: one, or several that an index holds together."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ring_rl.lm.pretrained.tensor_source import TensorSource
from ring_rl.typing import Float32

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_LFS_POINTER = b"version https://git-lfs"


class SafetensorsFolder(TensorSource):
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        FileNotFoundError: There are no such files, or shards are missing.
        ImportError: `safetensors` is not installed.
        ValueError: A file is cut off or no safetensors file, a tensor is not where the index says, or its numbers are
            quantised.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = contextlib.ExitStack()
        self._tensors: dict[str, Any] = {}
        try:
            promised = _promised(folder)
            for file in sorted(set(promised.values())):
                opened = self._files.enter_context(_opened(folder / file))
                self._tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            _check_tensors(folder, promised, self._tensors)
        except BaseException:
            self._files.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._files.close()

    @property
    def description(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """From the headers of the files."""
        return {name: tuple(tensor.get_shape()) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        """A part of a tensor, whatever floating-point type it is stored in."""
        return np.asarray(self._tensors[name][index]).astype(np.float32, copy=False)


def _promised(folder: Path) -> dict[str, str]:
    """The file of every tensor, as far as an index says so; otherwise the one file there is, under no name.

    Where both are there, transformers reads the one file.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        return {"": SINGLE_FILE}
    if not index.exists():
        raise FileNotFoundError(_nothing_to_read(folder))
    try:
        promised = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r}); download it again") from None
    files = sorted(set(promised.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of its {len(files)} shards: {', '.join(missing)}; download them there"
        )
    return promised


def _nothing_to_read(folder: Path) -> str:
    message = f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        return f"{message}, but PyTorch's pickled weights; save them as safetensors (transformers: save_pretrained)"
    return f"{message}; name the folder that the weights were downloaded to"


def import_safetensors() -> Any:
    """The library, or an ImportError that says how to get it."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"these weights need the safetensors library: pip install 'ring_rl[lm]' ({error})") from None
    return safetensors


def _opened(file: Path) -> Any:
    library = import_safetensors()
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull there")
    try:
        return library.safe_open(file, framework="np")
    except library.SafetensorError as error:
        raise ValueError(f"{file} is cut off or no safetensors file ({error}); download it again") from None


def _check_tensors(folder: Path, promised: Mapping[str, str], tensors: Mapping[str, Any]) -> None:
    absent = sorted(promised.keys() - tensors.keys() - {""})
    if absent:
        raise ValueError(
            f"{len(absent)} tensors that {folder / INDEX_FILE} names are not in their shards: {_listed(absent)}; "
            "download the shards and the index of one and the same revision"
        )
    quantised = sorted(name for name, tensor in tensors.items() if tensor.get_dtype() not in _FLOATS)
    if quantised:
        types = ", ".join(sorted({tensors[name].get_dtype() for name in quantised}))
        raise ValueError(
            f"{len(quantised)} tensors in {folder} are not floating-point numbers ({types}): {_listed(quantised)}; "
            f"use the model's unquantised weights, or its GGUF file"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
