"""The figure and its tables, from the answers of all cells."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ring_rl.atomic_file import write_whole
from ring_rl.config import to_mapping
from ring_rl.lm.evaluation.cells import MODE_NAMES, SampleRecord
from ring_rl.lm.evaluation.intervals import Proportion, wilson
from ring_rl.lm.evaluation.plots import length_label, log2_lengths
from ring_rl.lm.evaluation.report import PublishedCurves
from ring_rl.lm.reproduction.plan import Cell, Claim, PresetConfig
from ring_rl.training.plots import write_figure
from ring_rl.training.provenance import git_commit
from ring_rl.training.tables import markdown_table

__all__ = ["Point", "read_points", "write_figure_report"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A variant at a length, over training seeds.

    Attributes:
        by_seed: A share a training seed.
        pooled: Of the questions, each answered by all seeds: a trial is a question, for which their mean score counts,
            because seeds are asked the same ones. How seeds differ is not in its interval.
        tokens: Mean tokens of a prompt.
        lines: Mean lines of a record.
        chance: Of naming any line's value.
    """

    by_seed: dict[int, Proportion]
    pooled: Proportion
    tokens: float
    lines: float
    chance: float

    @property
    def mean(self) -> float:
        """Over training seeds, each counting once."""
        return float(np.mean([each.value for each in self.by_seed.values()]))

    def __str__(self) -> str:
        shares = [each.value for each in self.by_seed.values()]
        if len(shares) == 1:
            return f"{self.pooled:.3f}"
        return f"{self.mean:.3f} ({min(shares):.3f} to {max(shares):.3f})"


def read_points(preset: PresetConfig, cells: Sequence[Cell]) -> dict[str, dict[int, Point]]:
    """By variant and length in tokens, what the answers of these cells come to.

    Raises:
        FileNotFoundError: One of them was not asked.
    """
    points: dict[str, dict[int, Point]] = {}
    for name, variant in preset.variants.items():
        by_seed = {
            cell.seed: [record for record in cell.records() if record.mode == preset.mode]
            for cell in cells
            if cell.variant == name
        }
        for each in variant.lengths:
            # An evaluation may hold more samples than this preset asks for.
            asked = {
                seed: [r for r in records if r.length == each.tokens and r.index < each.samples]
                for seed, records in by_seed.items()
            }
            if not asked or not all(asked.values()):
                continue
            together = [record for records in asked.values() for record in records]
            points.setdefault(name, {})[each.tokens] = Point(
                by_seed={seed: wilson(sum(r.score for r in records), len(records)) for seed, records in asked.items()},
                pooled=_by_question(together),
                tokens=float(np.mean([record.tokens for record in together])),
                lines=float(np.mean([record.items or 0 for record in together])),
                chance=float(np.mean([record.chance for record in together])),
            )
    return points


def _by_question(records: Sequence[SampleRecord]) -> Proportion:
    scores: dict[int, list[float]] = {}
    for record in records:
        scores.setdefault(record.index, []).append(record.score)
    # Rounding may carry a sum of means past their number.
    return wilson(min(sum(float(np.mean(each)) for each in scores.values()), len(scores)), len(scores))


def write_figure_report(
    preset: PresetConfig, cells: Sequence[Cell], *, published: PublishedCurves, output: Path
) -> dict[str, str]:
    """Writes everything into `output` and returns the main figures by name."""
    points = read_points(preset, cells)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "accuracy.csv", _csv(points))
    write_whole(output / "table.md", markdown_table(_accuracy_table(preset, points)))
    write_whole(output / "training.md", markdown_table(_training_table(preset, cells)))
    claims = [_tested(claim, points, cells) for claim in preset.claims]
    write_whole(output / "claims.md", markdown_table(_claims_table(preset, claims)))
    trained = {name: _trained_length(cells, name) for name in points}
    _plot(preset, points, trained, published, output / "accuracy_by_length.png")
    evaluations = [json.loads((cell.evaluation / "summary.json").read_text()) for cell in cells]
    summary = {
        "preset": to_mapping(preset),
        "cells": len(cells),
        "cells_of_the_preset": len(preset.variants) * len(preset.seeds),
        "commits": sorted({each["commit"] or "unknown" for each in evaluations}),
        "report_commit": git_commit(),
        "devices": sorted({each["device"] for each in evaluations}),
        "versions": evaluations[0]["versions"],
        "trained_length": trained,
        "claims": claims,
        "published": dataclasses.asdict(published),
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    held = [claim["holds"] for claim in claims]
    longest = {name: max(by_length) for name, by_length in points.items()}
    figures = {f"{name}_{tokens}": f"{points[name][tokens].mean:.3f}" for name, tokens in longest.items()}
    return {**figures, "claims_that_hold": f"{sum(held)}/{len(held)}", "cells": str(len(cells))}


def _tested(claim: Claim, points: dict[str, dict[int, Point]], cells: Sequence[Cell]) -> dict[str, Any]:
    point = points.get(claim.variant, {}).get(claim.tokens)
    seconds = [cell.training_seconds for cell in cells if cell.variant == claim.variant]
    minutes = None if None in seconds or not seconds else max(each or 0.0 for each in seconds) / 60
    in_time = claim.minutes is None or (minutes is not None and minutes <= claim.minutes)
    return {
        **dataclasses.asdict(claim),
        "measured_accuracy": None if point is None else point.mean,
        "seeds": 0 if point is None else len(point.by_seed),
        "samples_a_seed": 0 if point is None else min(each.count for each in point.by_seed.values()),
        "measured_minutes": minutes,
        "holds": point is not None and point.mean >= claim.accuracy and in_time,
    }


def _claims_table(preset: PresetConfig, claims: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["claim", "accuracy", "seeds x samples", "longest training, minutes", "holds"]]
    for claim in claims:
        label, limit = preset.variants[claim["variant"]].label, claim["minutes"]
        accuracy, minutes = claim["measured_accuracy"], claim["measured_minutes"]
        within = "" if limit is None else f" within {limit:g} minutes"
        rows.append(
            [
                f"{label}: {claim['accuracy']:g} at {length_label(claim['tokens'])}{within}",
                "not asked" if accuracy is None else f"{accuracy:.3f}",
                f"{claim['seeds']} x {claim['samples_a_seed']}",
                "not timed: interrupted" if minutes is None else f"{minutes:.1f}",
                "yes" if claim["holds"] else "no",
            ]
        )
    return rows


def _accuracy_table(preset: PresetConfig, points: dict[str, dict[int, Point]]) -> list[list[str]]:
    lengths = sorted({tokens for by_length in points.values() for tokens in by_length})
    rows = [[f"model ({MODE_NAMES[preset.mode]})", "seeds", *map(length_label, lengths)]]
    some: dict[int, Point] = {}
    for name, by_length in points.items():
        seeds = len(next(iter(by_length.values())).by_seed)
        texts = [str(by_length[each]) if each in by_length else "" for each in lengths]
        rows.append([preset.variants[name].label, f"{seeds} of {len(preset.seeds)}", *texts])
        some |= by_length
    rows.append(["lines of the record", "", *(f"{some[each].lines:.0f}" for each in lengths)])
    rows.append(["chance", "", *(f"{some[each].chance:.4f}" for each in lengths)])
    return rows


def _training_table(preset: PresetConfig, cells: Sequence[Cell]) -> list[list[str]]:
    rows = [["model", "seed", "steps", "tokens", "compiling, s", "training, s", "stages reached early"]]
    for cell in cells:
        stages = cell.stages().values()
        resumed = " (resumed: last part only)" if any(stage.resumed for stage in stages) else ""
        rows.append(
            [
                preset.variants[cell.variant].label,
                str(cell.seed),
                str(max(stage.last_step for stage in stages)),
                f"{sum(stage.tokens for stage in stages):,}",
                f"{sum(stage.compile_seconds for stage in stages):.0f}{resumed}",
                f"{sum(stage.train_seconds for stage in stages):.0f}{resumed}",
                f"{sum(stage.advanced for stage in stages)} of {len(stages)}",
            ]
        )
    return rows


def _trained_length(cells: Sequence[Cell], variant: str) -> int | None:
    summaries = [
        json.loads((cell.evaluation / "summary.json").read_text()) for cell in cells if cell.variant == variant
    ]
    return summaries[0]["trained_length"]


def _plot(
    preset: PresetConfig,
    points: dict[str, dict[int, Point]],
    trained: dict[str, int | None],
    published: PublishedCurves,
    path: Path,
) -> None:
    """A curve a variant: the mean over seeds, a band from worst to best, Wilson bars over the questions."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, by_length) in enumerate(points.items()):
        ordered = [by_length[tokens] for tokens in sorted(by_length)]
        x, means = [each.tokens for each in ordered], np.array([each.mean for each in ordered])
        shares = [[share.value for share in each.by_seed.values()] for each in ordered]
        low, high = (np.array([getattr(each.pooled, end) for each in ordered]) for end in ("low", "high"))
        color, label = f"C{number}", preset.variants[name].label
        axes.errorbar(
            x,
            means,
            yerr=np.maximum([means - low, high - means], 0),
            color=color,
            marker="o",
            markersize=4,
            capsize=3,
            label=f"{label}, {len(shares[0])} seeds",
        )
        axes.fill_between(x, [min(each) for each in shares], [max(each) for each in shares], color=color, alpha=0.15)
        if (length := trained[name]) is not None:
            axes.axvline(length, color=color, linestyle="-.", linewidth=1, label=f"longest trained: {label}")
    some = {tokens: point for by_length in points.values() for tokens, point in by_length.items()}
    ordered = [some[tokens] for tokens in sorted(some)]
    axes.plot([each.tokens for each in ordered], [each.chance for each in ordered], ":", color="0.3", label="chance")
    for number, curve in enumerate(published.curves):
        grey = str(0.5 + 0.15 * min(number, 2))
        axes.plot(curve.lengths, curve.accuracy, color=grey, marker=".", linewidth=1, label=f"{curve.label}, paper")
    lengths = [*some, *(length for curve in published.curves for length in curve.lengths)]
    log2_lengths(axes, [2.0 ** round(np.log2(length)) for length in lengths], label="tokens of the prompt")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("line retrieval accuracy")
    axes.set_title(
        f"{preset.hardware}, {MODE_NAMES[preset.mode]}; bars: 95 % over the questions, bands: worst to best seed\n"
        f"in grey: {published.source}",
        fontsize="small",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    write_figure(figure, path)


def _csv(points: dict[str, dict[int, Point]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "length", "n", "accuracy", "low", "high", "tokens", "lines", "chance"])
    for name, by_length in points.items():
        for tokens, point in by_length.items():
            for seed, share in point.by_seed.items():
                numbers = [f"{each:.4f}" for each in (share.value, share.low, share.high)]
                means = [f"{point.tokens:.1f}", f"{point.lines:.1f}", f"{point.chance:.3g}"]
                writer.writerow([name, seed, tokens, share.count, *numbers, *means])
    return text.getvalue()
