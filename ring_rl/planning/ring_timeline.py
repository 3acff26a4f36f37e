"""When each device of a ring computes and when each transfer is under way, where devices or links are not alike.

In each phase of a ring (`ring_phases`) every device starts sending on what it holds, computes meanwhile, and goes on
when its block is done, its own transfer has left and that of its predecessor has arrived. So one slow device or link
delays its neighbour first and, a hop later, the next: in a long ring all run at its pace.

A transfer needs both of its ends: it starts when the later one enters the phase.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ring_rl.planning.ring_phases import RingPhases
from ring_rl.typing import Float

__all__ = ["Timeline", "draw_timelines", "simulate_ring"]

# Shades of neighbouring blocks; of more phases than this the seams are finer than a picture's dots.
_SHADES = ("0.42", "0.62")
_SHADED_PHASES = 40


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


def draw_timelines(timelines: dict[str, Timeline], *, devices_drawn: int, columns: int) -> Figure:
    """A panel a timeline: each device's blocks, and below them the transfer to its neighbour.

    Args:
        timelines: By title; they fill a column before the next one begins.
        devices_drawn: Rows at most; of a longer ring the first ones.
        columns: Of panels; those of a column have one axis of time.
    """
    rows = -(-len(timelines) // columns)
    shown = min(devices_drawn, max(timeline.block_start.shape[1] for timeline in timelines.values()))
    figure = Figure(figsize=(6.2 * columns, 0.6 + rows * (0.7 + 0.17 * shown)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex="col")
    for (title, timeline), axes in zip(timelines.items(), panels.T.flat, strict=False):
        phases, ring = timeline.block_start.shape
        count = min(devices_drawn, ring)
        colors = [_SHADES[phase % 2 if phases <= _SHADED_PHASES else 0] for phase in range(phases)]
        for device in range(count):
            blocks = _spans(timeline.block_start[:, device], timeline.block_end[:, device])
            axes.broken_barh(blocks, (device + 0.05, 0.55), facecolors=colors)
            sent = _spans(timeline.transfer_start[:, device], timeline.transfer_end[:, device])
            axes.broken_barh([span for span in sent if span[1] > 0], (device + 0.65, 0.25), facecolors="tab:green")
        left_out = f"; {ring - count} more devices not drawn" if ring > count else ""
        axes.set_title(f"{title}: {1e3 * timeline.seconds:.3g} ms, {timeline.idle_share:.0%} idle{left_out}", size=9)
        axes.set_ylim(count, 0)
        axes.set_yticks(np.arange(count) + 0.5, [str(device) for device in range(count)], size=7)
        axes.tick_params(axis="x", labelsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("device", size=8)
    for axes in panels[-1]:
        axes.set_xlabel("ms", size=8)
    legend = [Patch(color=_SHADES[0], label="computes a block"), Patch(color="tab:green", label="sends to the next")]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _spans(start_P: Float[np.ndarray, " P"], end_P: Float[np.ndarray, " P"]) -> list[tuple[float, float]]:
    """(start, length) in milliseconds."""
    return list(zip((1e3 * start_P).tolist(), (1e3 * (end_P - start_P)).tolist(), strict=True))
