"""Named tensors on disk, which are read a slice at a time."""

import contextlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ring_rl.typing import Float32


class TensorSource(contextlib.AbstractContextManager["TensorSource"], Protocol):
    """The tensors of a checkpoint by their Hugging Face names, whatever files they are in; closed on leaving it."""

    @property
    def description(self) -> str:
        """Where the tensors are, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        """A part of a tensor, with one slice of step 1 a dimension; no more of the file than that is read."""
        ...
