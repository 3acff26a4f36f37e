"""When training has left the road: a loss that is not finite, or many times what it was."""

from __future__ import annotations

import collections
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.atomic_file import atomic_file
from ring_rl.typing import Array, Bool, PyTree

__all__ = ["FEWEST_LOSSES", "RECENT_LOSSES", "DivergenceCheck", "DivergenceError", "all_finite", "save_offending_batch"]

# The median of this many losses is what a new one is compared with: it follows the curve, not its outliers.
RECENT_LOSSES = 64
# With fewer than these the median says little: the first steps of a training fall and jump.
FEWEST_LOSSES = 16


class DivergenceError(ValueError):
    """The loss, its gradient or a parameter is not finite any more, or the loss has exploded."""


class DivergenceCheck:
    """Looks at the metrics of every step, in order, for what no training comes back from.

    A step has diverged when its `loss` or `gradient_norm` is not finite, or when

        loss > largest_loss_ratio * median(the last 64 losses)

    The second rule waits for 16 losses and holds only while the median is positive, because a ratio to
    another one means nothing (a negative log-likelihood may well be negative).

    Args:
        largest_loss_ratio: None leaves the second rule out.
        recent_losses: those before the first step looked at, oldest first; a resumed run passes what its
            checkpoint holds, so that it decides as the run that was never interrupted.
    """

    def __init__(self, largest_loss_ratio: float | None, recent_losses: Iterable[float] = ()):
        self._largest_ratio = largest_loss_ratio
        self._recent = collections.deque(map(float, recent_losses), maxlen=RECENT_LOSSES)

    @property
    def recent_losses(self) -> list[float]:
        """The last losses that were found good, oldest first."""
        return list(self._recent)

    def complaint(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with a step's metrics, or None; a loss without fault joins the recent ones."""
        for name in ("loss", "gradient_norm"):
            value = metrics.get(name, 0.0)
            if not math.isfinite(value):
                return f"{name} is {value}"
        loss = metrics.get("loss")
        if loss is None:
            return None
        if self._largest_ratio is not None and len(self._recent) >= FEWEST_LOSSES:
            median = statistics.median(self._recent)
            if 0 < median * self._largest_ratio < loss:
                return (
                    f"loss {loss:.6g} is more than {self._largest_ratio:g} times "
                    f"the median {median:.6g} of the {len(self._recent)} before it"
                )
        self._recent.append(loss)
        return None


@jax.jit
def all_finite(tree: PyTree[Any]) -> Bool[Array, ""]:
    """Whether every number of every array is finite; reads each once, on the devices."""
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.isfinite(leaf).all()
    return finite


def save_offending_batch(folder: pathlib.Path, step: int, batch: PyTree[Any]) -> pathlib.Path:
    """Write the batch that training diverged on, for a look with `numpy.load`.

    Each leaf becomes one array, named by the path that leads to it; bfloat16, which numpy's files don't
    know, becomes float32. With several processes each writes its own part, `step_7.process_1.npz`. An
    earlier file is never replaced: the new one is then `step_7.2.npz`, and so on.

    Args:
        folder: created when missing.
        step: the step after which the divergence was seen, as the metrics count steps.
        batch: numpy arrays.
    """
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "batch"
        arrays[name] = array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step_{step}" + (f".process_{jax.process_index()}" if jax.process_count() > 1 else "")
    name, number = f"{stem}.npz", 1
    while (folder / name).exists():
        number += 1
        name = f"{stem}.{number}.npz"
    with atomic_file(folder / name, overwrite=False) as temporary:
        np.savez(temporary, **arrays)
    return folder / name
