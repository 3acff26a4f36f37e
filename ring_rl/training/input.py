"""The input pipeline: rows made by index, cut to this process's devices, placed on them ahead of time.

Row i of training step s is row s B + i of a `RowSource`, a pure function of that index. So the data order is a
function of the seed alone, and its whole state is the number of the next step: the same for any mesh and any
number of processes. Each process makes the rows, and of a row keeps the tokens, that its own devices hold.

A Grain pipeline makes the batches and places them on the devices in threads of its own, a few steps ahead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, SupportsIndex

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ring_rl.kernels.layout import Layout, permutation
from ring_rl.training.mesh import batch_sharding, with_shardings
from ring_rl.typing import PyTree

__all__ = ["BatchStream", "InputConfig", "RowSource", "RowStream"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How far ahead batches are made.

    Attributes:
        threads: threads that make and place batches, each a batch of its own; Python's lock is theirs together, so
            more of them help where numpy or the disk does the work.
        prefetch_batches: batches made ahead; so many lie on the devices besides the one in use.
    """

    threads: int
    prefetch_batches: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")


class RowSource(Protocol):
    """Rows of a batch, by index."""

    def row(self, index: int, /) -> PyTree[np.ndarray]:
        """Row `index` as arrays [T, ...] in natural order, or scalars; all rows have the same shapes.

        A pure function of the index (and of a seed that the source holds): it is called from several threads, and
        by other processes, in any order.
        """
        ...


class BatchStream(Protocol):
    """Batches in the order of the training steps."""

    def __next__(self) -> PyTree[jax.Array]:
        """The next global batch, on the devices."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain JSON; restoring it makes the next batch the one that has not been handed out yet."""
        ...

    def batch_at(self, step: int, /) -> PyTree[np.ndarray]:
        """The part of that step's batch that this process's devices hold, on the host."""
        ...

    def close(self) -> None:
        """Stop preparing batches."""
        ...


class RowStream:
    """A `BatchStream` over a `RowSource`, on a mesh.

    It makes row 0 at once, to know the shapes. Nothing runs ahead before `start` or the first `next`.

    Args:
        source: makes rows.
        batch_size: rows B of a global batch.
        steps: training steps in all; `next` raises StopIteration after the batch of the last one.
        mesh: batches are laid on it as `batch_sharding` says.
        layout: the order that tokens are put into, the only place where that happens.
        ring_size: devices that share one sequence, as the layout counts them.
        config: threads and batches ahead.

    Raises:
        ValueError: the mesh or the layout does not divide the batch or the tokens.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        steps: int,
        mesh: Mesh,
        layout: Layout,
        ring_size: int,
        config: InputConfig,
    ):
        self._batch_size = batch_size
        self._batches = _LocalBatches(
            source, batch_size=batch_size, steps=steps, mesh=mesh, layout=layout, ring_size=ring_size
        )
        dataset = grain.MapDataset.source(self._batches).map(self._batches.placed)
        options = grain.ReadOptions(
            num_threads=min(config.threads, config.prefetch_batches), prefetch_buffer_size=config.prefetch_batches
        )
        self._iterator = dataset.to_iter_dataset(options).__iter__()

    @property
    def abstract_batch(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of a batch, for compiling ahead of the data."""
        return self._batches.abstract

    def start(self) -> None:
        """Begin to prepare batches now, beside whatever the caller does before the first `next`."""
        self._iterator.start_prefetch()

    def __iter__(self) -> RowStream:
        return self

    def __next__(self) -> PyTree[jax.Array]:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """`{"next_step": s, "batch_size": B}`."""
        return {"next_step": int(self._iterator.get_state()["next_index"]), "batch_size": self._batch_size}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state` gave, under any mesh and number of processes.

        Raises:
            ValueError: it is no such state, or one of another batch size.
        """
        wanted = {"next_step", "batch_size"}
        if set(state) != wanted or not all(type(state[name]) is int for name in wanted):
            raise ValueError(f"an input state holds the integers next_step and batch_size, got {dict(state)}")
        if state["batch_size"] != self._batch_size:
            raise ValueError(
                f"the input state counts batches of {state['batch_size']} rows, this input makes {self._batch_size}; "
                f"set the batch size to {state['batch_size']}"
            )
        if not 0 <= state["next_step"] <= len(self._batches):
            raise ValueError(
                f"the input state goes on with step {state['next_step']}, but there are {len(self._batches)} steps; "
                f"raise steps"
            )
        self._iterator.set_state({"next_index": state["next_step"]})

    def batch_at(self, step: int) -> PyTree[np.ndarray]:
        """That step's batch again, made here and now; prefetching goes on undisturbed."""
        return self._batches[step]

    def close(self) -> None:
        """Stop preparing batches. Rows in the making are finished in their thread; only the end of Python waits."""
        self._iterator.close()


class _LocalBatches:
    """By step: the rows and tokens of that step's batch that this process's devices hold, as numpy arrays."""

    def __init__(self, source: RowSource, *, batch_size: int, steps: int, mesh: Mesh, layout: Layout, ring_size: int):
        self._source, self._batch_size, self._steps = source, batch_size, steps
        first = jax.tree.map(_as_jax_would, source.row(0))
        self._row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype), self._row)
        self.abstract = with_shardings(batch, batch_sharding(mesh, batch))
        self._leaves = jax.tree.map(
            lambda x: _LocalLeaf.of(x.shape, x.sharding, layout=layout, ring_size=ring_size), self.abstract
        )
        # The same for every array, as all are cut alike along the batch.
        self._rows = [int(row) for row in jax.tree.leaves(self._leaves)[0].rows]

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: SupportsIndex) -> PyTree[np.ndarray]:
        first = int(index) * self._batch_size
        rows = [self._checked_row(first + row) for row in self._rows]
        return jax.tree.map(lambda leaf, *arrays: leaf.stack(arrays), self._leaves, *rows)

    def placed(self, local_batch: PyTree[np.ndarray]) -> PyTree[jax.Array]:
        """A local batch as this process's part of the global one, each device receiving its share only."""
        return jax.tree.map(
            lambda x, leaf, whole: jax.make_array_from_callback(whole.shape, whole.sharding, leaf.share_of(x)),
            local_batch,
            self._leaves,
            self.abstract,
        )

    def _checked_row(self, index: int) -> PyTree[np.ndarray]:
        row = jax.tree.map(_as_jax_would, self._source.row(index))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), row)
        if shapes != self._row:
            raise ValueError(
                f"row {index} has the shapes {_described(shapes)}, row 0 has {_described(self._row)}; "
                f"pad rows to one length"
            )
        return row


@dataclasses.dataclass(frozen=True)
class _LocalLeaf:
    """Which rows of one array of the batch, and which tokens of a row, this process's devices hold.

    Attributes:
        rows: ascending indices into the batch.
        tokens: ascending indices into a row in layout order; None for one scalar a row.
        natural: where these tokens stand in a row in natural order.
    """

    rows: np.ndarray
    tokens: np.ndarray | None
    natural: np.ndarray | None

    @classmethod
    def of(cls, shape: tuple[int, ...], sharding: Any, *, layout: Layout, ring_size: int) -> _LocalLeaf:
        held = _held(shape, sharding)
        if len(shape) == 1:
            return cls(held[0], None, None)
        order = permutation(shape[1], ring_size=ring_size, layout=layout)
        return cls(held[0], held[1], order[held[1]])

    def stack(self, rows: Any) -> np.ndarray:
        """The rows' tokens of this process, in layout order."""
        if self.natural is None:
            return np.stack(rows)
        stacked = np.empty((len(rows), len(self.natural), *rows[0].shape[1:]), rows[0].dtype)
        for row, into in zip(rows, stacked, strict=True):
            # Straight into place; "clip" spares the copy that numpy makes to leave `out` as it was after an error.
            np.take(row, self.natural, axis=0, out=into, mode="clip")
        return stacked

    def share_of(self, local: np.ndarray) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
        """What a device receives of the local array, as a function of its slice of the global one."""

        def share(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            within = tuple(
                _within(held, part)
                for held, part in zip((self.rows, self.tokens), index, strict=False)
                if held is not None
            )
            return local[within]

        return share


def _held(shape: tuple[int, ...], sharding: NamedSharding) -> list[np.ndarray]:
    """For each axis the ascending indices that this process's devices hold."""
    slices = sharding.addressable_devices_indices_map(shape).values()
    return [
        np.unique(np.concatenate([np.arange(length)[index[axis]] for index in slices if index is not None]))
        for axis, length in enumerate(shape[:2])
    ]


def _within(held: np.ndarray, part: slice) -> slice:
    """A slice of a global axis as a slice of the held indices, all of which it covers without a gap."""
    start = 0 if part.start is None else int(np.searchsorted(held, part.start))
    stop = len(held) if part.stop is None else int(np.searchsorted(held, part.stop))
    return slice(start, stop)


def _as_jax_would(x: Any) -> np.ndarray:
    """As an array of the type that JAX keeps: without x64 a float64 becomes a float32."""
    x = np.asarray(x)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def _described(shapes: PyTree[jax.ShapeDtypeStruct]) -> str:
    return ", ".join(
        f"{jax.tree_util.keystr(path).lstrip('.') or 'row'} {x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    )
