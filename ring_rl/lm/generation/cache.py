"""How much room generation makes for keys and values, and whether the devices have it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_rl.kernels.cache_slots import DEFAULT_SLOT_BLOCK
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.nn.parallel import SequenceParallel


class CacheSize(NamedTuple):
    """Room in a cache.

    Attributes:
        slots: Of a row, on all devices together.
        slot_block: Positions dealt to a device at a time, as in `ring_rl.kernels.cache_slots`.
    """

    slots: int
    slot_block: int


def cache_size(tokens: int, *, devices: int) -> CacheSize:
    """Room for `tokens` tokens a row, in few sizes so that few programs are compiled.

    Slots come in quarters of an octave, and in whole blocks on all devices: at most a quarter of them, and a block on
    each device, are in vain. A context of few tokens is dealt out in small blocks, so that every device holds a part.
    """
    quarter = 1 << max(tokens.bit_length() - 3, 0)
    slots = -(-max(tokens, DEFAULT_SLOT_BLOCK) // quarter) * quarter
    share = max(slots // devices, 1)
    slot_block = min(DEFAULT_SLOT_BLOCK, 1 << (share.bit_length() - 1))
    return CacheSize(-(-slots // (devices * slot_block)) * devices * slot_block, slot_block)


def batch_devices(parallel: SequenceParallel | None) -> int:
    """Among how many devices the rows are shared; their number must be a multiple of it."""
    return 1 if parallel is None else math.prod(parallel.size(axis) for axis in parallel.batch_axes)


def cache_bytes(config: LanguageModelConfig, *, rows: int, slots: int, parallel: SequenceParallel | None) -> int:
    """Of keys and values, on each device: 2 · layers · rows · slots · K · D numbers, shared among them."""
    transformer = config.transformer
    numbers = 2 * transformer.layers * rows * slots * transformer.key_value_heads * transformer.head_dim
    shares = 1 if parallel is None else parallel.sequence_devices * batch_devices(parallel)
    return numbers * jnp.dtype(transformer.compute_dtype).itemsize // shares


def check_cache_fits(config: LanguageModelConfig, *, rows: int, slots: int, parallel: SequenceParallel | None) -> None:
    """Raises ValueError if a device says that it has less memory free than its part of the cache takes."""
    needed = cache_bytes(config, rows=rows, slots=slots, parallel=parallel)
    free = free_bytes(jax.devices()[0] if parallel is None else parallel.mesh.local_devices[0])
    if free is not None and needed > free:
        raise ValueError(
            f"a cache of {rows} rows of {slots} tokens takes {needed / 2**30:.1f} GiB a device, of which "
            f"{free / 2**30:.1f} GiB are free; read fewer prompts at once, or share it among more devices"
        )


def free_bytes(device: jax.Device) -> int | None:
    """Memory that nothing occupies; None where the device does not say, as CPUs do not."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        return None
    return int(statistics["bytes_limit"]) - int(statistics.get("bytes_in_use", 0))
