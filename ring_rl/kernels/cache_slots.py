"""Which positions the slots of a cache of keys and values hold, on one device or spread over a mesh axis.

Blocks of `slot_block` positions are dealt round robin, so that a growing cache is balanced from its first tokens on:

    device of position p    p // slot_block mod R
    slot on that device     p // slot_block // R * slot_block  +  p mod slot_block

A device's slots are thus in order of position, and with R = 1 the slot is the position.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_rl.typing import Array, Int32

DEFAULT_SLOT_BLOCK = 128


def slot_positions(slots: int, *, ring_size: int, slot_block: int = DEFAULT_SLOT_BLOCK) -> Int32[np.ndarray, " slots"]:
    """The position that each slot of a whole cache holds, the devices' slots one after the other.

    `x[..., slot_positions(...), :]` brings keys in the order of their positions into that of a cache that is then
    sharded over `ring_size` devices; `np.argsort` of it is the way back.
    """
    if slots % ring_size:
        raise ValueError(f"{slots} slots cannot be shared by {ring_size} devices; use a multiple of {ring_size}")
    count = slots // ring_size
    check_slots(count, ring_size=ring_size, slot_block=slot_block)
    local = np.arange(count, dtype=np.int32)
    of = [Slots(device, ring_size, slot_block, count).position(local) for device in range(ring_size)]
    return np.concatenate(of).astype(np.int32)


def check_slots(slots: int, *, ring_size: int, slot_block: int) -> None:
    """Raises ValueError unless each of `ring_size` devices can keep whole blocks in its `slots` slots."""
    if slot_block < 1:
        raise ValueError(f"slot_block must be at least 1 position, got {slot_block}")
    if ring_size > 1 and slots % slot_block:
        fit = -(-slots // slot_block) * slot_block
        raise ValueError(f"{slots} cache slots a device are not divisible by slot_block {slot_block}; use {fit}")


def check_capacity(length: int | np.ndarray | Array, *, new_tokens: int, capacity: int) -> None:
    """Raises ValueError unless every row has room for `new_tokens` after its `length` cached ones.

    For the host, before a step: under jit `length` is not known yet, and an overfull cache drops the tokens it has no
    slot for, so that they do not see themselves. `capacity` is that of all devices together.
    """
    longest = int(np.max(np.asarray(length)))
    if longest + new_tokens > capacity:
        raise ValueError(
            f"{longest} cached and {new_tokens} new tokens need {longest + new_tokens} cache slots, but there are "
            f"{capacity}; make a larger cache or feed at most {max(capacity - longest, 0)} tokens"
        )


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which positions the `count` slots of one device hold."""

    device: int | Array
    ring_size: int
    block: int
    count: int

    @staticmethod
    def of(cache: Array, axis_name: str | None, slot_block: int) -> "Slots":
        """Those of this device's cache, [B, K, S, D]."""
        count = cache.shape[2]
        if axis_name is None:
            return Slots(0, 1, slot_block, count)
        ring_size = lax.axis_size(axis_name)
        check_slots(count, ring_size=ring_size, slot_block=slot_block)
        return Slots(lax.axis_index(axis_name), ring_size, slot_block, count)

    def position(self, slot):
        """What a slot holds."""
        if self.ring_size == 1:
            return slot
        return (slot // self.block * self.ring_size + self.device) * self.block + slot % self.block

    def before(self, position: Array) -> Array:
        """How many slots lie before the first one that holds `position` (not negative) or a later one."""
        if self.ring_size == 1:
            return jnp.minimum(position, self.count)
        blocks, rest = position // self.block, position % self.block
        whole = (blocks - self.device + self.ring_size - 1) // self.ring_size * self.block
        return jnp.minimum(whole + jnp.where(blocks % self.ring_size == self.device, rest, 0), self.count)

    def most(self, tokens: int) -> int:
        """The most slots that `tokens` consecutive positions, wherever they start, can fill."""
        if self.ring_size == 1:
            return min(tokens, self.count)
        blocks = (tokens + self.block - 2) // self.block + 1
        return min(tokens, -(-blocks // self.ring_size) * self.block, self.count)
