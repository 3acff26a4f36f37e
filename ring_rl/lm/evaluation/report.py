"""What an evaluation leaves beside its samples: CSV, a table, a summary, pictures and the harness's layout."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ring_rl.atomic_file import write_whole
from ring_rl.lm.evaluation.cells import MODE_NAMES, SampleRecord
from ring_rl.lm.evaluation.export import harness_results
from ring_rl.lm.evaluation.plots import (
    PublishedCurve,
    length_label,
    plot_by_depth,
    plot_by_length,
    plot_heat_map,
)
from ring_rl.lm.evaluation.scores import (
    CellScore,
    by_answer_depth,
    by_cell,
    by_length,
    effective_length,
    mean_over_tasks,
)
from ring_rl.training.tables import markdown_table

__all__ = ["PublishedCurves", "ReportConfig", "Subject", "score_rows", "write_report"]

_CSV_COLUMNS = ("mode", "task", "length", "depth", "n", "score", "low", "high", "tokens", "items", "chance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedCurves:
    """A paper's curves for the same task; `differs` says, a sentence each, what stands between them and ours."""

    source: str
    differs: tuple[str, ...]
    curves: tuple[PublishedCurve, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is drawn.

    Attributes:
        depth_bins: Of the curve over where the answer stands.
        published: Curves of a paper beside ours; null draws none.
        effective_threshold: The mean score, 0 to 1, that counts as mastering a length; null where a suite has none.
    """

    depth_bins: int
    published: PublishedCurves | None
    effective_threshold: float | None

    def __post_init__(self) -> None:
        if self.depth_bins < 1:
            raise ValueError(f"report.depth_bins must be at least 1, got {self.depth_bins}")
        if self.effective_threshold is not None and not 0 < self.effective_threshold <= 1:
            raise ValueError(f"report.effective_threshold must lie in (0, 1], got {self.effective_threshold}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """Who was asked.

    Attributes:
        name: Of the model, for titles.
        trained_length: Tokens of the longest rows it was trained on; None if unknown.
        seed: Of the samples.
        settings: Of the evaluation, as plain JSON.
        provenance: Commit, device and versions.
    """

    name: str
    trained_length: int | None
    seed: int
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]


def write_report(
    records: Sequence[SampleRecord], output: Path, *, suite: str, unit: str, subject: Subject, config: ReportConfig
) -> dict[str, Any]:
    """Writes everything into `output`, replacing what an earlier report left, and returns the summary.

    Raises:
        ValueError: There is no record.
    """
    if not records:
        raise ValueError("no sample is answered yet, so there is nothing to report; evaluate first")
    cells, lengths = by_cell(records), by_length(records)
    effective = _effective(lengths, config.effective_threshold)
    title = f"{subject.name}: {suite.replace('_', ' ')}"
    write_whole(output / "accuracy.csv", _csv(cells))
    write_whole(output / "table.md", markdown_table(score_rows(lengths)))
    harness = harness_results(
        lengths,
        model_name=subject.name,
        seed=subject.seed,
        settings=subject.settings,
        commit=subject.provenance.get("commit"),
    )
    write_whole(output / "harness_results.json", json.dumps(harness, indent=2) + "\n")
    summary = {
        "suite": suite,
        "model": subject.name,
        "trained_length": subject.trained_length,
        "unit_of_length": unit,
        "seed": subject.seed,
        **subject.provenance,
        "samples": len(records),
        "scores": [dataclasses.asdict(each) for each in lengths],
        "effective_length": effective,
        "published": None if config.published is None else dataclasses.asdict(config.published),
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    plot_by_length(
        lengths,
        output / "accuracy_by_length.png",
        title=title if config.published is None else f"{title}\nin grey: {config.published.source}",
        trained_length=subject.trained_length,
        published=() if config.published is None else config.published.curves,
        x_label="tokens of the prompt",
    )
    if any(each.depth is not None for each in cells):
        plot_heat_map(cells, output / "heat_map.png", title=title, x_label=f"{unit} of the prompt")
    if binned := by_answer_depth(records, bins=config.depth_bins):
        plot_by_depth(binned, output / "accuracy_by_depth.png", title=title, trained_length=subject.trained_length)
    return summary


def score_rows(scores: Sequence[CellScore]) -> list[list[str]]:
    """A table of `by_length`, its header first: a row a task and mode, a column a length."""
    lengths = sorted({each.length for each in scores})
    rows = [["task", "mode", "n", *(length_label(each) for each in lengths)]]
    curves: dict[tuple[str, str], dict[int, CellScore]] = {}
    for each in scores:
        curves.setdefault((each.task, MODE_NAMES[each.mode]), {})[each.length] = each
    for (task, mode), curve in curves.items():
        counts = sorted({each.score.count for each in curve.values()})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        rows.append([task, mode, n, *(str(curve[each].score) if each in curve else "" for each in lengths)])
    some = {each.length: each for each in scores}
    rows.append(["mean tokens of a prompt", "", "", *(f"{some[each].tokens:.0f}" for each in lengths)])
    if any(each.items is not None for each in scores) and len({each.task for each in scores}) == 1:
        items = [some[each].items for each in lengths]
        rows.append(["mean lines (or needles) in it", "", "", *("" if n is None else f"{n:.0f}" for n in items)])
    return rows


def _effective(lengths: Sequence[CellScore], threshold: float | None) -> dict[str, Any] | None:
    if threshold is None:
        return None
    tasks = sorted({each.task for each in lengths})
    return {
        "threshold": threshold,
        "tasks": tasks,
        "note": "mean over these tasks only; RULER's own figure is over all thirteen",
        **{
            mode: {"mean_by_length": means, "effective_length": effective_length(means, threshold=threshold)}
            for mode, means in mean_over_tasks(lengths).items()
        },
    }


def _csv(scores: Sequence[CellScore]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for each in scores:
        share = each.score
        writer.writerow(
            [
                each.mode,
                each.task,
                each.length,
                "" if each.depth is None else f"{each.depth:g}",
                share.count,
                f"{share.value:.4f}",
                f"{share.low:.4f}",
                f"{share.high:.4f}",
                f"{each.tokens:.1f}",
                "" if each.items is None else f"{each.items:.1f}",
                f"{each.chance:.3g}",
            ]
        )
    return text.getvalue()
