"""Where a model's activations live: which mesh axis shards the batch, which one the sequence."""

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_rl.kernels.layout import Layout, check_length
from ring_rl.typing import Array, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceParallel:
    """A mesh and the layout of the sequence on it.

    Attributes:
        mesh: Holds `batch_axis` and `sequence_axis`, each of any size, 1 included.
        layout: The order in which token axes arrive, already permuted.
        batch_axis: The mesh axis that batches are sharded over.
        sequence_axis: The mesh axis that token axes are sharded over: the ring.
    """

    mesh: Mesh
    layout: Layout
    batch_axis: str = "dp"
    sequence_axis: str = "sp"

    @property
    def ring_size(self) -> int:
        """Devices that share one sequence."""
        return self.mesh.shape[self.sequence_axis]

    @property
    def token_spec(self) -> PartitionSpec:
        """The sharding of arrays [batch, tokens, ...]."""
        return PartitionSpec(self.batch_axis, self.sequence_axis)

    def check(self, batch: int, length: int) -> None:
        """Raises ValueError unless the mesh can share `batch` sequences of `length` tokens."""
        data_parallel = self.mesh.shape[self.batch_axis]
        if batch % data_parallel:
            raise ValueError(
                f"batch of {batch} sequences is not divisible by {self.batch_axis}={data_parallel}; "
                f"use a multiple of {data_parallel}"
            )
        check_length(length, ring_size=self.ring_size, layout=self.layout)

    def constrain(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """`x`, told to the compiler to be sharded over batch and tokens."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.token_spec))
