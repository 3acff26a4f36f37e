"""Draws the pictures of ring_rl/kernels/README.md from what the library itself computes, in a few seconds.

python experiments/draw_kernels.py --overwrite
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ring_rl.atomic_file import atomic_file
from ring_rl.config import exit_on_bad_input
from ring_rl.kernels import CAUSAL, FULL, Mask, permutation
from ring_rl.kernels.layout import LAYOUTS, Layout
from ring_rl.kernels.local.block import Demand, Relation, Scoring
from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.mask import visible
from ring_rl.kernels.pairs import hop_pairs, visible_pairs, work_balance
from ring_rl.kernels.strategies import ring
from ring_rl.kernels.strategies.plan import Plan, Side
from ring_rl.kernels.tokens import Cotangents, Keys, Queries
from ring_rl.typing import Array, Int

FIGURES_FOLDER = Path(__file__).parent / "results" / "kernel_figures"
RING_SIZE = 4
# Okabe and Ito's colours, which colour-blind eyes tell apart; text on any of them is black.
COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
GREY, HIDDEN = "#BBBBBB", "#F4F4F4"
# A block's operations are proportional to the products it makes for a pair: two forward, five backward.
Direction = Literal["forward", "backward"]
PRODUCTS: dict[Direction, int] = {"forward": 2, "backward": 5}


def holders(tokens: int, layout: Layout) -> Int[np.ndarray, " T"]:
    """The device that holds each token of the sequence."""
    device_T = np.empty(tokens, np.int64)
    device_T[permutation(tokens, ring_size=RING_SIZE, layout=layout)] = np.repeat(
        np.arange(RING_SIZE), tokens // RING_SIZE
    )
    return device_T


def draw_layouts() -> Figure:
    """Which device holds which token: the sequence, and each device's share of it."""
    tokens = 4 * RING_SIZE
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    for row, (layout, axes) in enumerate(zip(LAYOUTS, np.atleast_1d(figure.subplots(3, 1)), strict=True)):
        device_T = holders(tokens, layout)
        for t in range(tokens):
            _cell(axes, t, 0, COLORS[device_T[t]], str(t))
        order = permutation(tokens, ring_size=RING_SIZE, layout=layout)
        for place, t in enumerate(order):
            # A gap between devices: from here on the shares are in different memories.
            _cell(axes, tokens + 2 + place + 0.4 * (place // 4), 0, COLORS[place // 4], str(t))
        axes.set(xlim=(-0.1, 2 * tokens + 3.4), ylim=(-0.1, 1.1), xticks=[], yticks=[])
        axes.set_ylabel(layout, rotation=0, ha="right", va="center")
        _without_frame(axes)
        if row == 0:
            axes.text(tokens / 2, 1.35, "the sequence, coloured by the device that holds a token", ha="center")
            axes.text(1.5 * tokens + 2.6, 1.35, "what devices 0, 1, 2, 3 hold, in their order", ha="center")
    figure.legend(
        handles=[Patch(color=COLORS[i], label=f"device {i}") for i in range(RING_SIZE)],
        loc="outside lower center",
        ncols=RING_SIZE,
        frameon=False,
    )
    return figure


def draw_zigzag_hop() -> Figure:
    """The hop at which each pair of chunks is computed, and which pairs of one hop are visible."""
    chunks = 2 * RING_SIZE
    device = holders(chunks, "zigzag")
    seen = np.asarray(visible(CAUSAL, np.arange(chunks), np.arange(chunks)))
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(2.2, 1, 1))
    axes = figure.add_subplot(grid[0])
    hop_colors = (GREY, *COLORS)
    for q in range(chunks):
        for k in range(chunks):
            hop = (device[q] - device[k]) % RING_SIZE
            color, label = (hop_colors[hop], str(device[q])) if seen[q, k] else (HIDDEN, "")
            # Of a block on the diagonal only the lower half is visible, where its number then stands.
            _cell(axes, k, q, color, label, label_at=(0.3, 0.7) if q == k else (0.5, 0.5))
            if q == k:
                axes.fill([k, k + 1, k + 1], [q, q, q + 1], facecolor=HIDDEN, edgecolor="0.3", linewidth=0.8)
    holder_labels = [f"{c}\n(dev {device[c]})" for c in range(chunks)]
    axes.set_xticks(np.arange(chunks) + 0.5, holder_labels, fontsize=8)
    axes.set_yticks(np.arange(chunks) + 0.5, [x.replace("\n", " ") for x in holder_labels], fontsize=8)
    axes.set(xlim=(0, chunks), ylim=(chunks, 0), xlabel="chunk of keys", ylabel="chunk of queries", aspect="equal")
    axes.set_title("numbers: the device that computes a block", fontsize=10)
    handles = [Patch(color=c, label=f"hop {t}" if t else "own block") for t, c in enumerate(hop_colors[:RING_SIZE])]
    axes.legend(handles=handles, loc="upper right", fontsize=9)
    for column, (i, j) in enumerate(((2, 0), (2, 3)), start=1):
        _draw_pairs_of_a_hop(figure.add_subplot(grid[column]), device, i, j)
    return figure


def draw_work_by_hop() -> Figure:
    """Pairs that each device computes at each hop of a causal ring, for every layout."""
    tokens = 1024 * RING_SIZE
    even = visible_pairs(CAUSAL, tokens) / RING_SIZE**2
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(LAYOUTS), sharey=True))
    for layout, axes in zip(LAYOUTS, panels, strict=True):
        share_RR = hop_pairs(CAUSAL, layout=layout, tokens=tokens, ring_size=RING_SIZE) / even
        for i in range(RING_SIZE):
            axes.bar(np.arange(RING_SIZE) + 0.2 * (i - 1.5), share_RR[:, i], 0.18, color=COLORS[i], label=f"device {i}")
        for t in range(RING_SIZE):
            axes.plot([t - 0.45, t + 0.45], [share_RR[t].max()] * 2, color="black", linewidth=1.2)
        balance = work_balance(CAUSAL, layout=layout, tokens=tokens, ring_size=RING_SIZE)
        axes.set_title(f"{layout}: {balance:.2f} times the even share", fontsize=10)
        axes.set_xticks(range(RING_SIZE), ["own", *(f"hop {t}" for t in range(1, RING_SIZE))])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("work of a hop\n(even share: 1)")
    panels[1].legend(fontsize=9, ncols=2, loc="upper center", frameon=False)
    return figure


def draw_timeline() -> Figure:
    """One device's blocks and transfers, forward and backward, as `strategies/ring.py` orders them."""
    device = 1
    strips = {direction: record_ring(direction, device=device) for direction in PRODUCTS}
    # The slowest link behind which everything still hides, of either direction.
    bytes_per_second = max(_needed_rate(strip) for strip in strips.values())
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(2, 1, sharex=True))
    for axes, (direction, strip) in zip(panels, strips.items(), strict=True):
        clock, link_free, pending_since = 0.0, 0.0, None
        for event in strip:
            if isinstance(event, Send):
                pending_since = clock if pending_since is None else pending_since
                link_free = max(link_free, pending_since)
                seconds = event.bytes / bytes_per_second
                color = "white" if event.what == "k, v" else GREY
                _cell(axes, link_free, 0, color, event.what, width=seconds, height=0.8)
                link_free += seconds
            else:
                color = COLORS[event.device]
                label = "own" if event.device == device else f"keys of {event.device}"
                _cell(axes, clock, 1, color, label, width=event.work, height=0.8)
                clock += event.work
                pending_since = None if event.tied else pending_since
        axes.set(ylim=(-0.2, 2.0), xticks=[], yticks=[0.4, 1.4], yticklabels=["link", "blocks"])
        axes.tick_params(length=0)
        axes.set_title(direction, loc="left", fontsize=10)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    panels[1].set_xlim(left=-1)
    panels[1].set_xlabel(
        f"time; device {device} of {RING_SIZE}, zigzag, bfloat16, K = H, at the slowest link that hides everything"
    )
    return figure


def draw_window() -> Figure:
    """Where the keys of a sliding window are, in the zigzag layout."""
    chunk, window = 4, 4
    tokens = 2 * RING_SIZE * chunk
    device_T, chunk_T = holders(tokens, "zigzag"), np.arange(tokens) // chunk
    seen = np.asarray(visible(Mask(causal=True, window=window), np.arange(tokens), np.arange(tokens)))
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "same chunk": GREY,
        "the device before": COLORS[0],
        "the device after": COLORS[1],
        "same device": COLORS[2],
    }
    for q, k in np.argwhere(seen):
        if chunk_T[q] == chunk_T[k]:
            kind = "same chunk"
        else:
            step = device_T[k] - device_T[q]
            kind = {-1: "the device before", 1: "the device after", 0: "same device"}[int(step)]
        axes.add_patch(Rectangle((k, q), 1, 1, facecolor=kinds[kind], edgecolor="white", linewidth=0.5))
    starts = np.arange(0, tokens, chunk)
    for edge in starts.tolist():
        axes.axhline(edge, color="0.85", linewidth=0.6, zorder=0)
        axes.axvline(edge, color="0.85", linewidth=0.6, zorder=0)
    names = [f"dev {device_T[c * chunk]}" for c in range(2 * RING_SIZE)]
    axes.set_xticks(starts + chunk / 2, names, fontsize=8)
    axes.set_yticks(starts + chunk / 2, names, fontsize=8)
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), xlabel="keys", ylabel="queries", aspect="equal")
    handles = [Patch(color=color, label=kind) for kind, color in kinds.items()]
    axes.legend(handles=handles, title="keys come from", loc="upper right", fontsize=9)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "layouts.png": draw_layouts,
    "zigzag_hop.png": draw_zigzag_hop,
    "work_by_hop.png": draw_work_by_hop,
    "timeline.png": draw_timeline,
    "window.png": draw_window,
}


@dataclasses.dataclass(frozen=True)
class Send:
    """A transfer that was begun: "k, v" or "dk, dv"."""

    what: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Block:
    """A call of the local block on keys of `device`; `tied` if transfers under way are awaited after it."""

    device: int
    work: float
    tied: bool


def record_ring(direction: Direction, *, device: int) -> list[Send | Block]:
    """What one device of a zigzag ring does in "forward" or "backward", in the order in which the ring does it.

    The ring itself runs, one operation after the other, with a plan and a local block that note what they are asked.
    """
    events: list[Send | Block] = []
    share, heads = 8, 1
    plan = _NotingPlan(
        axis_name=None,
        size=RING_SIZE,
        layout="zigzag",
        placed=False,
        mask=CAUSAL,
        scoring=Scoring(scale=1.0),
        local=_NotingBlock(events, PRODUCTS[direction], holders(share * RING_SIZE, "zigzag")),
        looks_at_positions=False,
        prefers_positions=False,
        heads_at_once=None,
        device=device,
        events=events,
    )
    x = jnp.ones((1, heads, share, 2), jnp.bfloat16)
    rows = jnp.ones((1, heads, share), jnp.float32)
    with jax.disable_jit():  # so that a loop over hops is one
        if direction == "forward":
            ring.forward(plan, x, x, x, Side())
        else:
            ring.backward(plan, x, x, x, Side(), Cotangents(x, rows, x, rows))
    return events


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _NotingPlan(Plan):
    """A plan of one device alone, whose transfers are noted and bring back what was sent."""

    device: int
    events: list[Send | Block]

    @property
    def index(self) -> int:
        return self.device

    def send(self, tree: Any, *, by: int = 1) -> Any:
        del by
        leaves = jax.tree.leaves(tree)
        what = "dk, dv" if leaves[0].dtype == jnp.float32 else "k, v"
        self.events.append(Send(what, sum(x.nbytes for x in leaves)))
        return tree


class _NotingBlock:
    """A local block that notes the work of each call and returns zeros."""

    looks_at_positions = prefers_positions = False
    heads_at_once = None

    def __init__(self, events: list[Send | Block], products: int, device_T: Int[np.ndarray, " T"]):
        self.events, self.products, self.device_T = events, products, device_T

    def refusal(self, demand: Demand) -> None:
        del demand

    def forward(
        self, queries: Queries, keys: Keys, *, relation: Relation, scoring: Scoring, tie: Tie = untied
    ) -> tuple[Array, Array]:
        del scoring
        self._note(queries, keys, relation, tie)
        out, log_sum_exp = tie((_zeros(queries.q), _zeros(queries.q[..., 0])))
        return out, log_sum_exp

    def backward(
        self,
        queries: Queries,
        keys: Keys,
        cotangents: Cotangents,
        *,
        relation: Relation,
        scoring: Scoring,
        tie: Tie = untied,
    ) -> tuple[Array, Array, Array]:
        del cotangents, scoring
        self._note(queries, keys, relation, tie)
        dq, dk, dv = tie((_zeros(queries.q), _zeros(keys.k), _zeros(keys.v)))
        return dq, dk, dv

    def _note(self, queries: Queries, keys: Keys, relation: Relation, tie: Tie) -> None:
        rows, T, S = queries.q.shape[0], queries.q.shape[2], keys.k.shape[2]
        # The diagonal itself is left out: of long sequences it is nothing, of these few tokens too much.
        pairs = rows * (T * S if relation.mask == FULL else T * S / 2)
        device = int(self.device_T[int(keys.positions[0, 0])])
        self.events.append(Block(device, self.products * pairs, tie is not untied))


def _needed_rate(strip: list[Send | Block]) -> float:
    """The least bytes a unit of work at which everything sent arrives within the blocks up to the next tied one."""
    rate, sent, worked = 0.0, 0, 0.0
    for event in strip:
        if isinstance(event, Send):
            sent += event.bytes
            continue
        worked = worked + event.work if sent else 0.0
        if event.tied:
            rate, sent, worked = max(rate, sent / worked), 0, 0.0
    return rate


def _draw_pairs_of_a_hop(axes: Axes, device: Int[np.ndarray, " chunks"], i: int, j: int) -> None:
    queries, keys = np.flatnonzero(device == i), np.flatnonzero(device == j)
    seen = np.asarray(visible(CAUSAL, queries, keys))
    for row in range(2):
        for column in range(2):
            color = COLORS[2] if seen[row, column] else HIDDEN
            _cell(axes, column, row, color, "visible" if seen[row, column] else "hidden")
    axes.set_xticks([0.5, 1.5], [f"early k\n(chunk {keys[0]})", f"late k\n(chunk {keys[1]})"], fontsize=8)
    axes.set_yticks([0.5, 1.5], [f"early q\n({queries[0]})", f"late q\n({queries[1]})"], fontsize=8)
    axes.set(xlim=(0, 2), ylim=(2, 0), aspect="equal")
    axes.set_title(f"device {i}, keys of {j}: j {'<' if j < i else '>'} i", fontsize=10)


def _zeros(x: Array) -> Array:
    return jnp.zeros(x.shape, jnp.float32)


def _cell(
    axes: Axes,
    x: float,
    y: float,
    color: str,
    label: str,
    *,
    width: float = 1.0,
    height: float = 1.0,
    label_at: tuple[float, float] = (0.5, 0.5),
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="0.3", linewidth=0.8))
    axes.text(x + width * label_at[0], y + height * label_at[1], label, ha="center", va="center", fontsize=8)
    axes.autoscale_view()


def _without_frame(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw(folder: Path, *, overwrite: bool) -> None:
    """Writes every picture into a folder that exists.

    Raises:
        FileExistsError: One of them is there already, and `overwrite` is False.
    """
    taken = [name for name in FIGURES if (folder / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{folder} holds {', '.join(taken)} already; give another --output or --overwrite")
    for name, figure in FIGURES.items():
        with atomic_file(folder / name, overwrite=overwrite) as temporary:
            figure().savefig(temporary, dpi=110)


def main() -> None:
    """Draws them from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FIGURES_FOLDER, help="folder that the pictures go to")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there already")
    arguments = parser.parse_args()
    with exit_on_bad_input():
        arguments.output.mkdir(parents=True, exist_ok=True)
        draw(arguments.output, overwrite=arguments.overwrite)


if __name__ == "__main__":
    main()
