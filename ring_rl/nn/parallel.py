"""Where a model's activations live: which mesh axis shards the batch, which one the sequence."""

import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_rl.kernels.layout import Layout, check_length
from ring_rl.typing import Array, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceParallel:
    """A mesh and the layout of the sequence on it.

    Attributes:
        mesh: Holds `sequence_axis`; those of `batch_axes` that it lacks count as size 1.
        layout: The order in which token axes arrive, already permuted.
        batch_axes: The mesh axes that batches are sharded over.
        sequence_axis: The mesh axis that token axes are sharded over: the ring.
    """

    mesh: Mesh
    layout: Layout
    batch_axes: tuple[str, ...] = ("dp", "fsdp")
    sequence_axis: str = "sp"

    @property
    def ring_size(self) -> int:
        """Devices that share one sequence."""
        return self.mesh.shape[self.sequence_axis]

    @property
    def token_spec(self) -> PartitionSpec:
        """The sharding of arrays [batch, tokens, ...]."""
        return PartitionSpec(tuple(self._batch_sizes), self.sequence_axis)

    @property
    def _batch_sizes(self) -> dict[str, int]:
        """The size of each batch axis that the mesh has."""
        return {axis: self.mesh.shape[axis] for axis in self.batch_axes if axis in self.mesh.shape}

    def check(self, batch: int, length: int) -> None:
        """Raises ValueError unless the mesh can share `batch` sequences of `length` tokens."""
        data_parallel = math.prod(self._batch_sizes.values())
        if batch % data_parallel:
            raise ValueError(
                f"batch of {batch} sequences is not divisible by "
                f"{' x '.join(f'{axis}={size}' for axis, size in self._batch_sizes.items())}; "
                f"use a multiple of {data_parallel}"
            )
        check_length(length, ring_size=self.ring_size, layout=self.layout)

    def constrain(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """`x`, told to the compiler to be sharded over batch and tokens."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.token_spec))
