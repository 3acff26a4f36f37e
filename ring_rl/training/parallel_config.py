"""How the devices of a mesh work on one sequence, as an entry point's configuration says it."""

from __future__ import annotations

import dataclasses

from ring_rl.kernels.layout import Layout
from ring_rl.kernels.local.block import LocalName
from ring_rl.nn.parallel import SequenceParallel, SequenceStrategy
from ring_rl.training.mesh import MeshConfig, make_mesh

__all__ = ["LaidOutParallelConfig", "ParallelConfig", "make_parallel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the devices that share a sequence meet, and whether they share the weights; see `SequenceParallel`.

    Attributes:
        strategy: How shards of a sequence meet.
        ulysses_size: With strategy="hybrid", devices that swap tokens for heads; 1 otherwise.
        weights_over_ring: Whether they share weights and moments, too.
        local_block: What computes a device's share of attention.
        heads_at_once: Key-value heads that go round the ring at a time; None leaves it to the local block.
    """

    strategy: SequenceStrategy
    ulysses_size: int
    weights_over_ring: bool
    local_block: LocalName
    heads_at_once: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaidOutParallelConfig(ParallelConfig):
    """For entry points whose configuration says nowhere else which tokens each of these devices holds."""

    layout: Layout


def make_parallel(mesh: MeshConfig, config: ParallelConfig, *, layout: Layout) -> SequenceParallel:
    """The mesh and what its axes are for.

    Args:
        mesh: Sizes of the axes.
        config: How the devices that share a sequence work on it.
        layout: Which of its tokens each of them holds.

    Raises:
        ValueError: see `make_mesh` and `SequenceParallel`.
    """
    return SequenceParallel(
        mesh=make_mesh(mesh),
        layout=layout,
        strategy=config.strategy,
        ulysses_size=config.ulysses_size,
        weight_axes=("fsdp", "sp") if config.weights_over_ring else ("fsdp",),
        local_block=config.local_block,
        heads_at_once=config.heads_at_once,
    )
