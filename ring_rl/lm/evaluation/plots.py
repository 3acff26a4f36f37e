"""Pictures of an evaluation in the field's style: accuracy against length, length x depth, accuracy against depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ring_rl.lm.evaluation.cells import MODE_NAMES
from ring_rl.lm.evaluation.scores import CellScore
from ring_rl.training.plots import write_figure

__all__ = [
    "PublishedCurve",
    "length_label",
    "log2_lengths",
    "plot_by_depth",
    "plot_by_length",
    "plot_curves",
    "plot_heat_map",
]

# Red, yellow and green, as heat maps of needle tests have them since EasyContext's.
_HEAT = LinearSegmentedColormap.from_list("retrieval", ["#F0496E", "#EBB839", "#0CD79F"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedCurve:
    """Numbers of a paper, to stand in grey beside ours.

    Attributes:
        label: Whose model.
        lengths: Tokens.
        accuracy: 0 to 1, one a length.
    """

    label: str
    lengths: tuple[int, ...]
    accuracy: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.accuracy):
            raise ValueError(f"{self.label} has {len(self.lengths)} lengths and {len(self.accuracy)} accuracies")


def length_label(tokens: float) -> str:
    """4096 is "4K", 1048576 is "1M"."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:.0f}"


def log2_lengths(axes: Axes, lengths: Sequence[float], *, label: str) -> None:
    """An axis of lengths by their logarithm, with a tick at each of ours."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(lengths))
    axes.set_xticks(ticks, [length_label(each) for each in ticks], rotation=45 if len(ticks) > 8 else 0)
    axes.minorticks_off()
    axes.set_xlabel(label)


def plot_by_length(
    scores: Sequence[CellScore],
    path: Path,
    *,
    title: str,
    trained_length: int | None,
    published: Sequence[PublishedCurve],
    x_label: str,
) -> None:
    """Accuracy with Wilson bars against the tokens of a prompt, a curve a task and mode; chance is dotted.

    Args:
        scores: Of `by_length`.
        path: The picture.
        title: Above it.
        trained_length: Drawn as a vertical line; beyond it the model extrapolates.
        published: Curves of a paper.
        x_label: What the lengths are.
    """
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    curves: dict[tuple[str, str], list[CellScore]] = {}
    for each in scores:
        curves.setdefault((each.task, each.mode), []).append(each)
    tasks = list(dict.fromkeys(task for task, _ in curves))
    for number, ((task, mode), curve) in enumerate(curves.items()):
        # A little beside one another: curves of both modes often agree.
        aside = 2 ** (0.03 * (number - (len(curves) - 1) / 2))
        x, color = [aside * each.tokens for each in curve], f"C{tasks.index(task)}"
        share = np.array([[each.score.value, each.score.low, each.score.high] for each in curve])
        count = sorted({each.score.count for each in curve})
        n = f"n = {count[0]}" if len(count) == 1 else f"n = {count[0]} to {count[-1]}"
        axes.errorbar(
            x,
            share[:, 0],
            yerr=np.abs(share[:, 1:] - share[:, :1]).T,
            color=color,
            marker="o" if mode == "generated" else "s",
            linestyle="-" if mode == "generated" else "--",
            capsize=3,
            markersize=4,
            label=f"{task}, {MODE_NAMES[curve[0].mode]}, {n}",
        )
        axes.plot(x, [each.chance for each in curve], color=color, linestyle=":", linewidth=1, alpha=0.7)
    axes.plot([], [], color="0.4", linestyle=":", linewidth=1, label="chance")
    for number, curve in enumerate(published):
        grey = str(0.45 + 0.12 * min(number, 3))
        axes.plot(curve.lengths, curve.accuracy, color=grey, marker=".", linewidth=1, label=curve.label)
    if trained_length is not None:
        axes.axvline(trained_length, color="0.3", linestyle="-.", linewidth=1, label="longest trained")
    lengths = [each.tokens for each in scores] + [length for curve in published for length in curve.lengths]
    log2_lengths(axes, _few(lengths), label=x_label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("accuracy, with 95% intervals")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    write_figure(figure, path)


def plot_heat_map(scores: Sequence[CellScore], path: Path, *, title: str, x_label: str) -> None:
    """Scores of `by_cell` by length and depth, one panel a task and mode, 0 red and 1 green."""
    panels: dict[tuple[str, str], list[CellScore]] = {}
    for each in scores:
        if each.depth is not None:
            panels.setdefault((each.task, MODE_NAMES[each.mode]), []).append(each)
    if not panels:
        raise ValueError("a heat map needs cells with depths; none of these has one")
    lengths = sorted({each.length for panel in panels.values() for each in panel})
    depths = sorted({each.depth for panel in panels.values() for each in panel if each.depth is not None})
    width = max(4.4, 0.6 * len(lengths) + 2)
    figure = Figure(figsize=(width * len(panels), 0.32 * len(depths) + 2.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((task, mode), panel) in zip(grid, panels.items(), strict=True):
        values = np.full((len(depths), len(lengths)), np.nan)
        for each in panel:
            if each.depth is not None:
                values[depths.index(each.depth), lengths.index(each.length)] = each.score.value
        axes.imshow(values, cmap=_HEAT, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [length_label(each) for each in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{100 * each:.0f}%" for each in depths])
        axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(depths)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel("depth of the needle")
        count = sorted({each.score.count for each in panel})
        n = f"{count[0]}" if len(count) == 1 else f"{count[0]} to {count[-1]}"
        axes.set_title(f"{task}, {mode}: mean {np.nanmean(values):.2f}, {n} samples a cell", fontsize="small")
    figure.colorbar(grid[0].images[0], ax=list(grid), label="score")
    figure.suptitle(title, fontsize="medium")
    write_figure(figure, path)


def plot_by_depth(scores: Sequence[CellScore], path: Path, *, title: str, trained_length: int | None) -> None:
    """Scores of `by_answer_depth`, with Wilson bars, a curve a length, one panel a task and mode."""
    panels: dict[tuple[str, str], dict[int, list[CellScore]]] = {}
    for each in scores:
        panels.setdefault((each.task, MODE_NAMES[each.mode]), {}).setdefault(each.length, []).append(each)
    if not panels:
        raise ValueError("a curve over depths needs samples that say where the answer stands; none of these does")
    lengths = sorted({length for panel in panels.values() for length in panel})
    colors = {length: _shade(index, len(lengths)) for index, length in enumerate(lengths)}

    def aside(length: int) -> float:
        """In per cent: bars of different lengths stand beside one another."""
        return 1.2 * (lengths.index(length) - (len(lengths) - 1) / 2)

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, ((task, mode), panel) in zip(grid, panels.items(), strict=True):
        for length, curve in sorted(panel.items()):
            share = np.array([[each.score.value, each.score.low, each.score.high] for each in curve])
            beyond = trained_length is not None and np.mean([each.tokens for each in curve]) > trained_length
            axes.errorbar(
                [100 * (each.depth or 0.0) + aside(length) for each in curve],
                share[:, 0],
                yerr=np.abs(share[:, 1:] - share[:, :1]).T,
                color=colors[length],
                marker="o",
                markersize=3,
                capsize=2,
                linewidth=1,
                linestyle="--" if beyond else "-",
                label=f"{length_label(length)}{', beyond training' if beyond else ''}" if axes is grid[0] else None,
            )
        axes.set_title(f"{task}, {mode}", fontsize="small")
        axes.set_xlabel("where the answer stands, % of the prompt")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("accuracy, with 95% intervals")
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    write_figure(figure, path)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    title: str,
    y_label: str,
    trained_length: int | None,
) -> None:
    """Values against length, such as perplexity, a curve a name."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    if trained_length is not None:
        axes.axvline(trained_length, color="0.3", linestyle="-.", linewidth=1, label="longest trained")
    log2_lengths(axes, [length for points in curves.values() for length, _ in points], label="tokens of context")
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    write_figure(figure, path)


def _shade(index: int, count: int) -> tuple[float, float, float]:
    start, end = np.array([0.62, 0.79, 0.88]), np.array([0.03, 0.19, 0.42])
    red, green, blue = start + (end - start) * (index / max(count - 1, 1))
    return float(red), float(green), float(blue)


def _few(lengths: Sequence[float]) -> list[float]:
    """Lengths that lie within an eighth of an octave of each other share one tick, at the nearest power of two."""
    return sorted({2.0 ** round(float(np.log2(length))) for length in lengths})
