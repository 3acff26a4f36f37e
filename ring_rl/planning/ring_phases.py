"""What the devices of a ring have to do in each of its phases: a block to compute while a transfer is under way.

    forward, R phases          block 0 (own)  1  ...  R-1
                               send  k,v      k,v ... nothing
    backward, R + 1 phases     block first part of own  1    2         ...  R-1    second part of own
                               send  k,v                k,v  k,v,sums  ...  sums   sums

Under a window for which neighbours are enough (`kernels.cost.window_halo`) there are fewer:

    forward, 2 phases          block own, then what the neighbours' keys are for; sent: their keys, nothing
    backward, 3 phases         block half of own, the neighbours', half of own; sent: keys, nothing, sums

Worked on some heads at a time, a layer runs as many rings one after another: the same blocks and bytes in all, and the
latency of a hop for each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ring_rl.kernels.cost import AttentionShape, Cost, traffic, window_halo
from ring_rl.kernels.layout import Layout
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.pairs import hop_pairs
from ring_rl.planning.rates import Cluster, Group, Rates
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.typing import Float, Int

__all__ = [
    "RingPhases",
    "busiest_pairs",
    "busiest_phases",
    "layer_rings",
    "phase_pairs",
    "ring_bytes",
    "ring_phases",
]

_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class RingPhases:
    """What a ring of R devices has to do in P phases.

    Attributes:
        block_seconds: Of device i in phase p.
        transfer_seconds: From device i to device i + 1 (mod R) in phase p; 0 where nothing is sent.
    """

    block_seconds: Float[np.ndarray, "P R"]
    transfer_seconds: Float[np.ndarray, "P R"]

    def __post_init__(self) -> None:
        blocks, transfers = self.block_seconds, self.transfer_seconds
        if blocks.ndim != 2 or blocks.shape != transfers.shape or 0 in blocks.shape:
            raise ValueError(f"a ring needs seconds of [phases, devices], got {blocks.shape} and {transfers.shape}")
        if min(blocks.min(), transfers.min()) < 0 or not np.isfinite([blocks.sum(), transfers.sum()]).all():
            raise ValueError("seconds of blocks and transfers must be finite and not negative")

    @property
    def waiting_seconds(self) -> float:
        """What the phases take longer than their blocks, where each ends for all devices together."""
        blocks_P, transfers_P = self.block_seconds.max(axis=1), self.transfer_seconds.max(axis=1)
        return float(np.maximum(transfers_P - blocks_P, 0).sum())

    @property
    def tightest(self) -> tuple[float, float]:
        """(transfer, block) of the phase whose block covers its transfer worst."""
        blocks_P, transfers_P = self.block_seconds.max(axis=1), self.transfer_seconds.max(axis=1)
        p = int(np.argmax(transfers_P - blocks_P))
        return float(transfers_P[p]), float(blocks_P[p])


def layer_rings(sizes: StepSizes) -> tuple[AttentionShape, int]:
    """What one ring attends to, and how many a layer runs one after another; heads are those of a device.

    Raises:
        ValueError: There is no ring.
    """
    if not sizes.keys_travel:
        raise ValueError(f"strategy={sizes.request.strategy!r} with sp={sizes.mesh.sp} has no ring")
    shape, exchange = sizes.attention_shape(), sizes.exchange_size
    queries = shape.query_heads // exchange
    keys, at_once, rings, rows = sizes.key_heads, sizes.key_heads_together, 1, shape.batch
    if sizes.request.heads_at_once is not None:
        # A group of all heads of a single row is the whole.
        rings, rows = rows * (keys // at_once), 1
    shape = dataclasses.replace(shape, batch=rows, query_heads=at_once * (queries // keys), key_value_heads=at_once)
    return shape, rings


def ring_bytes(sizes: StepSizes) -> Cost:
    """What a device sends at a hop of one ring: k and v; in backward besides them the float32 sums of dk and dv.

    Under a window for which neighbours are enough: all that it sends them.

    Raises:
        ValueError: There is no ring.
    """
    shape, _ = layer_rings(sizes)
    if _windowed(sizes):
        ring = {"layout": sizes.request.layout, "axis_size": sizes.ring_size}
        return traffic(shape, strategy="ring", mask=sizes.mask, **ring)
    elements = 2 * shape.batch * (shape.tokens // sizes.ring_size) * shape.key_value_heads * shape.head_dim
    return Cost(elements * shape.element_bytes, elements * (shape.element_bytes + _FLOAT32_BYTES))


def phase_pairs(sizes: StepSizes) -> Int[np.ndarray, "P R"]:
    """Pairs of a query and a key that each device computes in each forward phase, of one head of one row."""
    pairs_RR = hop_pairs(
        sizes.mask, layout=sizes.request.layout, tokens=sizes.request.context, ring_size=sizes.ring_size
    )
    return np.stack([pairs_RR[0], pairs_RR[1:].sum(axis=0)]) if _windowed(sizes) else pairs_RR


def busiest_pairs(sizes: StepSizes) -> tuple[int, ...]:
    """Of each forward phase the pairs of the device that has most of them."""
    request = sizes.request
    return _busiest_pairs(sizes.mask, request.layout, request.context, sizes.ring_size, _windowed(sizes))


def busiest_phases(sizes: StepSizes, *, cluster: Cluster, rates: Rates, backward: bool) -> RingPhases:
    """`ring_phases` of a single device that has the most work of each phase."""
    pairs_P = np.array(busiest_pairs(sizes))
    return _phases(sizes, pairs_P[:, None], cluster=cluster, rates=rates, backward=backward)


def ring_phases(
    sizes: StepSizes,
    *,
    cluster: Cluster,
    rates: Rates,
    backward: bool,
    device_speeds: Sequence[float] = (),
    link_speeds: Sequence[float] = (),
) -> RingPhases:
    """What one of a layer's rings does, forward or backward, by the devices' rates and the mask.

    Args:
        sizes: The step; its strategy must be a ring or a hybrid with one.
        cluster: Peak rates of each device and link.
        rates: What is reached of them.
        backward: Which of the two.
        device_speeds: Each device's speed as a multiple of the cluster's; empty: all alike.
        link_speeds: The same of the link from each device to the next.

    Raises:
        ValueError: There is no ring, or the speeds are not one positive number a device.
    """
    layer_rings(sizes)
    speeds_R = _speeds("device_speeds", device_speeds, sizes.ring_size)
    links_R = _speeds("link_speeds", link_speeds, sizes.ring_size)
    even = _phases(sizes, phase_pairs(sizes), cluster=cluster, rates=rates, backward=backward)
    latency = np.where(even.transfer_seconds > 0, rates.hop_latency_seconds, 0.0)
    transfers = (even.transfer_seconds - latency) / links_R + latency
    return RingPhases(even.block_seconds / speeds_R, transfers)


def _phases(
    sizes: StepSizes, pairs_PX: Int[np.ndarray, "P X"], *, cluster: Cluster, rates: Rates, backward: bool
) -> RingPhases:
    shape, _ = layer_rings(sizes)
    seconds_a_pair = shape.batch * shape.query_heads * shape.head_dim
    seconds_a_pair /= cluster.device.flops_per_second * rates.attention_share
    sent, hops = ring_bytes(sizes), len(pairs_PX) - 1
    keys, sums = float(sent.forward), float(sent.backward - sent.forward)
    if backward:
        own_1X = pairs_PX[:1] / 2
        blocks_PX = 10 * seconds_a_pair * np.concatenate([own_1X, pairs_PX[1:], own_1X])
        bytes_P = np.array([keys] * hops + [0.0, 0.0]) + np.array([0.0, 0.0] + [sums] * hops)
    else:
        blocks_PX = 4 * seconds_a_pair * pairs_PX
        bytes_P = np.array([keys] * hops + [0.0])
    group = Group(stride=sizes.exchange_size, size=sizes.ring_size)
    transfers_P = bytes_P / (cluster.neighbour_bytes_per_second(group) * rates.link_share)
    transfers_P += np.where(bytes_P > 0, rates.hop_latency_seconds, 0.0)
    return RingPhases(blocks_PX, np.broadcast_to(transfers_P[:, None], blocks_PX.shape))


def _windowed(sizes: StepSizes) -> bool:
    ring = {"layout": sizes.request.layout, "ring_size": sizes.ring_size}
    return window_halo(sizes.mask, tokens=sizes.request.context, **ring) is not None


@functools.lru_cache(maxsize=1024)
def _busiest_pairs(mask: Mask, layout: Layout, tokens: int, ring_size: int, windowed: bool) -> tuple[int, ...]:
    pairs_RR = hop_pairs(mask, layout=layout, tokens=tokens, ring_size=ring_size)
    pairs_PR = np.stack([pairs_RR[0], pairs_RR[1:].sum(axis=0)]) if windowed else pairs_RR
    return tuple(pairs_PR.max(axis=1).tolist())


def _speeds(name: str, speeds: Sequence[float], ring: int) -> Float[np.ndarray, " R"]:
    if not speeds:
        return np.ones(ring)
    if len(speeds) != ring or min(speeds) <= 0:
        raise ValueError(f"{name} must be {ring} positive numbers, one a device of the ring, got {list(speeds)}")
    return np.asarray(speeds, float)
