"""When each device of a ring computes and when each transfer is under way, where devices or links are not alike.

A ring runs in phases. In each of them every device starts sending on what it holds, computes meanwhile, and goes on
when its block is done, its own transfer has left and that of its predecessor has arrived. So one slow device or link
delays its neighbour first and, a hop later, the next: in a long ring all run at its pace.

    forward, R phases          block 0 (own)  1  ...  R-1
                               send  k,v      k,v ... nothing
    backward, R + 1 phases     block first part of own  1    2         ...  R-1    second part of own
                               send  k,v                k,v  k,v,sums  ...  sums   sums

A transfer needs both of its ends: it starts when the later one enters the phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ring_rl.kernels.hardware import Hardware
from ring_rl.kernels.pairs import hop_pairs
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.typing import Float

__all__ = ["RingPhases", "Timeline", "draw_timelines", "ring_phases", "simulate_ring"]

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


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Seconds from the start of the ring.

    Attributes:
        block_start: Of device i in phase p.
        block_end: The same.
        transfer_start: From device i to the next.
        transfer_end: The same; equal to the start where nothing is sent.
    """

    block_start: Float[np.ndarray, "P R"]
    block_end: Float[np.ndarray, "P R"]
    transfer_start: Float[np.ndarray, "P R"]
    transfer_end: Float[np.ndarray, "P R"]

    @property
    def seconds(self) -> float:
        """Until the last device has finished and everything has arrived."""
        return float(max(self.block_end.max(), self.transfer_end.max()))

    @property
    def idle_share(self) -> float:
        """Share of the devices' time in which they compute nothing."""
        return 1.0 - float((self.block_end - self.block_start).sum()) / (self.seconds * self.block_end.shape[1])


def simulate_ring(phases: RingPhases) -> Timeline:
    """The timeline of a ring whose devices wait for their neighbours and for nobody else."""
    blocks, transfers = phases.block_seconds, phases.transfer_seconds
    block_start, transfer_start = np.zeros_like(blocks), np.zeros_like(blocks)
    ready_R = np.zeros(blocks.shape[1])
    for p in range(len(blocks)):
        block_start[p] = ready_R
        sends = transfers[p] > 0
        transfer_start[p] = np.where(sends, np.maximum(ready_R, np.roll(ready_R, -1)), ready_R)
        sent_R = transfer_start[p] + transfers[p]
        ready_R = np.maximum(ready_R + blocks[p], np.maximum(sent_R, np.roll(sent_R, 1) * np.roll(sends, 1)))
    return Timeline(block_start, block_start + blocks, transfer_start, transfer_start + transfers)


def ring_phases(
    sizes: StepSizes,
    *,
    hardware: Hardware,
    attention_share: float,
    link_share: float,
    backward: bool,
    device_speeds: Sequence[float] = (),
    link_speeds: Sequence[float] = (),
) -> RingPhases:
    """What one layer's ring does, forward or backward, by the device's rates and the mask.

    Args:
        sizes: The step; its strategy must be a ring or a hybrid with one.
        hardware: Peak rates of each device and link.
        attention_share: Of the peak of matrix products that attention reaches.
        link_share: Of the link's bandwidth that transfers reach.
        backward: Which of the two.
        device_speeds: Each device's speed as a multiple of the hardware's; empty: all alike.
        link_speeds: The same of the link from each device to the next.

    Raises:
        ValueError: There is no ring, or the speeds are not one positive number a device.
    """
    ring = sizes.ring_size
    if sizes.attention_strategy not in ("ring", "hybrid") or ring < 2:
        raise ValueError(f"strategy={sizes.request.strategy!r} with sp={sizes.mesh.sp} has no ring to draw")
    speeds_R = _speeds("device_speeds", device_speeds, ring)
    links_R = _speeds("link_speeds", link_speeds, ring)
    shape, exchange = sizes.attention_shape(), sizes.exchange_size
    heads, key_heads = shape.query_heads // exchange, max(shape.key_value_heads, exchange) // exchange
    pairs_RR = hop_pairs(sizes.mask, layout=sizes.request.layout, tokens=shape.tokens, ring_size=ring)
    seconds_a_pair = shape.batch * heads * shape.head_dim / (hardware.flops_per_second * attention_share)
    elements = 2 * shape.batch * (shape.tokens // ring) * key_heads * shape.head_dim
    seconds_a_byte = 1 / (hardware.neighbour_bytes_per_second * link_share)
    keys, sums = elements * shape.element_bytes * seconds_a_byte, elements * _FLOAT32_BYTES * seconds_a_byte
    if backward:
        own = pairs_RR[:1] / 2
        blocks = 10 * seconds_a_pair * np.concatenate([own, pairs_RR[1:], own])
        sent = [keys] * (ring - 1) + [0.0, 0.0]
        late = [0.0, 0.0] + [sums] * (ring - 1)
        transfers = np.array(sent) + np.array(late)
    else:
        blocks = 4 * seconds_a_pair * pairs_RR
        transfers = np.array([keys] * (ring - 1) + [0.0])
    return RingPhases(blocks / speeds_R, transfers[:, None] / links_R)


def draw_timelines(timelines: dict[str, Timeline], *, devices_drawn: int) -> Figure:
    """A panel a timeline: each device's blocks, and below them the transfer to its neighbour.

    Args:
        timelines: By title.
        devices_drawn: Rows at most; of a longer ring the first ones.
    """
    shown = [min(devices_drawn, timeline.block_start.shape[1]) for timeline in timelines.values()]
    figure = Figure(figsize=(9.0, sum(1.1 + 0.34 * count for count in shown)), layout="constrained")
    panels = figure.subplots(
        len(timelines), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [3 + n for n in shown]}
    )
    for (title, timeline), count, axes in zip(timelines.items(), shown, panels[:, 0], strict=True):
        for device in range(count):
            bars = list(zip(timeline.block_start[:, device], timeline.block_end[:, device], strict=True))
            for phase, (start, end) in enumerate(bars):
                color = "0.35" if phase % 2 else "0.55"
                axes.broken_barh([(1e3 * start, 1e3 * (end - start))], (device, 0.5), color=color)
            sent = zip(timeline.transfer_start[:, device], timeline.transfer_end[:, device], strict=True)
            spans = [(1e3 * start, 1e3 * (end - start)) for start, end in sent if end > start]
            axes.broken_barh(spans, (device + 0.55, 0.25), color="tab:green", edgecolor="white", linewidth=0.4)
        left_out = timeline.block_start.shape[1] - count
        more = f", {left_out} more devices not drawn" if left_out else ""
        axes.set_title(f"{title}: {1e3 * timeline.seconds:.3g} ms, {timeline.idle_share:.0%} idle{more}", size=9)
        axes.set_ylim(count, -0.2)
        axes.set_yticks(np.arange(count) + 0.4, [str(device) for device in range(count)], size=7)
        axes.set_ylabel("device", size=8)
    panels[-1, 0].set_xlabel("ms; grey computes a block, green sends it on", size=8)
    return figure


def _speeds(name: str, speeds: Sequence[float], ring: int) -> Float[np.ndarray, " R"]:
    if not speeds:
        return np.ones(ring)
    if len(speeds) != ring or min(speeds) <= 0:
        raise ValueError(f"{name} must be {ring} positive numbers, one a device of the ring, got {list(speeds)}")
    return np.asarray(speeds, float)
