"""Which local block runs: the fastest that can serve, or the one asked for."""

import logging
import os

import jax

from ring_rl.kernels.local.block import LOCAL_NAMES, Demand, LocalBlock, LocalName
from ring_rl.kernels.local.cudnn import CudnnBlock
from ring_rl.kernels.local.native_cpu import NativeCpuBlock, cores_here
from ring_rl.kernels.local.pallas_tpu import PallasTpuBlock
from ring_rl.kernels.local.xla import XlaBlock

_log = logging.getLogger(__name__)

# Largest edge of a tile of scores. On a CPU a ring has a thread for each device: one head's tile, 256 KiB, stays in a
# core's cache; and where windows or documents end in the midst of tiles, smaller ones waste less on what is hidden.
# A shard of a single tile is another matter: transfers cost more than products, so all heads travel together, and
# there is nothing to skip. A device alone has all cores: as many heads as cores and larger tiles are what XLA divides
# among them.
BLOCK_SIZE = 512
RING_BLOCK_SIZE_ON_CPU = 256
CUT_RING_BLOCK_SIZE_ON_CPU = 128

# The first that does not refuse runs. XLA serves every demand on every platform.
_PREFERRED: dict[str, tuple[LocalName, ...]] = {
    "cpu": ("native_cpu", "xla"),
    "gpu": ("cudnn", "xla"),
    "tpu": ("pallas_tpu", "xla"),
}


def block_named(name: LocalName, demand: Demand, *, block_size: int | None) -> LocalBlock:
    """The block of that name; `block_size` is the edge of a tile where the block leaves that to its caller.

    Raises:
        ValueError: There is no such block.
    """
    if name == "xla":
        if jax.default_backend() == "cpu":
            return _xla_on_cpu(demand, block_size)
        return XlaBlock(block_size=block_size or BLOCK_SIZE)
    if name == "native_cpu":
        return _native_cpu(demand)
    if name == "cudnn":
        return CudnnBlock(log_sum_exp_gradient=demand.log_sum_exp_gradient)
    if name == "pallas_tpu":
        return PallasTpuBlock(block_size=block_size or BLOCK_SIZE)
    raise ValueError(f"unknown local block {name!r}; choose one of {', '.join(LOCAL_NAMES)}")


def select_block(local: LocalName | LocalBlock, demand: Demand, *, block_size: int | None) -> LocalBlock:
    """The block that serves `demand`; "auto" takes the best one of this platform and logs which, and why.

    Raises:
        ValueError: The name is unknown, or the block asked for cannot serve; the error says what would.
    """
    if local == "auto":
        refusals = []
        for name in _PREFERRED.get(jax.default_backend(), ("xla",)):
            block = block_named(name, demand, block_size=block_size)
            refusal = block.refusal(demand)
            if refusal is None:
                _log.info("local attention block: %s%s", name, "".join(f"; {r}" for r in refusals))
                return block
            refusals.append(f"not {name}: {refusal}")
        raise ValueError("no local attention block can serve: " + "; ".join(refusals))
    block = block_named(local, demand, block_size=block_size) if isinstance(local, str) else local
    refusal = block.refusal(demand)
    if refusal is not None:
        name = local if isinstance(local, str) else type(local).__name__
        raise ValueError(f'local attention block {name!r} cannot serve: {refusal}; local="xla" serves everything')
    return block


def _native_cpu(demand: Demand) -> NativeCpuBlock:
    cores = max(1, cores_here() // demand.devices)
    # A device alone gains nothing by it; a ring's buffers are those of the heads that go round it together.
    heads = None if demand.devices == 1 or demand.length <= RING_BLOCK_SIZE_ON_CPU else cores
    return NativeCpuBlock(cores=cores, heads_at_once=heads)


def _xla_on_cpu(demand: Demand, block_size: int | None) -> XlaBlock:
    if demand.devices == 1:
        heads = os.cpu_count() or 1
        return XlaBlock(block_size=block_size or BLOCK_SIZE, heads_at_once=heads, prefers_positions=True)
    cut = demand.segments or any(relation.mask.window is not None for relation in demand.relations)
    tile = block_size or (CUT_RING_BLOCK_SIZE_ON_CPU if cut else RING_BLOCK_SIZE_ON_CPU)
    if demand.length <= tile:
        return XlaBlock(block_size=tile)
    return XlaBlock(block_size=tile, heads_at_once=1, prefers_positions=True)
