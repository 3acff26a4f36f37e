"""The tables and pictures of a comparison, from the evaluations of its cells."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ring_rl.agent.evaluation.aggregate import aggregate_agents
from ring_rl.agent.evaluation.statistics import Rule
from ring_rl.agent.reproduction.comparison import Comparison, read_comparison
from ring_rl.agent.reproduction.findings import in_context_table, ordering_table
from ring_rl.agent.reproduction.pictures import plot_by_episode, plot_profiles, plot_scores
from ring_rl.agent.reproduction.plan import Cell, PresetConfig
from ring_rl.agent.reproduction.published import PublishedTable
from ring_rl.atomic_file import write_whole
from ring_rl.config import to_mapping
from ring_rl.training.provenance import git_commit
from ring_rl.training.tables import markdown_table
from ring_rl.typing import Float64

__all__ = ["write_report"]


def write_report(
    preset: PresetConfig,
    cells: Sequence[Cell],
    *,
    chance: Mapping[str, Path],
    published: PublishedTable,
    output: Path,
) -> dict[str, str]:
    """Writes everything into `output` and returns the main figures by name."""
    comparison = read_comparison(preset, cells, chance)
    output.mkdir(parents=True, exist_ok=True)
    samples = preset.bootstrap_samples
    aggregates = aggregate_agents(_scores(comparison), resamples=samples, seed=0)
    orderings, verdicts = ordering_table(comparison, published, resamples=samples)
    tables = {
        "returns.md": _returns_table(comparison, "mean"),
        "best.md": _returns_table(comparison, "best", published),
        "last.md": _returns_table(comparison, "last"),
        "table.md": _normalised_table(comparison, aggregates),
        "orderings.md": orderings,
    }
    if (context := in_context_table(comparison, flips=samples)) is not None:
        tables["in_context.md"] = context
    for name, rows in tables.items():
        write_whole(output / name, markdown_table(rows))
    write_whole(output / "cells.csv", _csv(comparison))
    plot_scores(comparison, aggregates, output / "scores.png")
    plot_by_episode(comparison, output / "by_episode.png")
    plot_profiles(comparison, output / "profiles.png", resamples=min(samples, 2000))
    seeds = {
        f"{task}/{name}": len(each.seeds) for task, of in comparison.tasks.items() for name, each in of.carried.items()
    }
    evaluations = [json.loads(cell.evaluation.read_text()) for cell in cells]
    summary = {
        "preset": to_mapping(preset),
        "cells": len(cells),
        "cells_of_the_preset": len(preset.variants) * len(preset.tasks) * len(preset.seeds),
        "training_seeds": seeds,
        "commits": sorted({each["commit"] or "unknown" for each in evaluations}),
        "report_commit": git_commit(),
        "devices": sorted({each["device"] for each in evaluations}),
        "versions": evaluations[0]["versions"],
        "data": {
            task: {"best": each.scale.best, "mean": each.data_mean, "random": each.scale.random}
            for task, each in comparison.tasks.items()
        },
        "aggregates": {name: dataclasses.asdict(each) for name, each in aggregates.items()},
        "orderings": verdicts,
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    figures = {f"{name}_iqm": f"{each.interquartile_mean.value:.1f}" for name, each in aggregates.items()}
    held = [each["verdict"] for each in verdicts if each["task"] not in preset.tasks]
    return {
        **figures,
        "orderings_that_hold": f"{held.count('holds')}/{len(held)}",
        "cells": str(len(cells)),
    }


def _scores(comparison: Comparison) -> dict[str, dict[str, Float64[np.ndarray, " seeds"]]]:
    variants = comparison.complete_variants()
    return {task: {name: each.scores(name) for name in variants} for task, each in comparison.tasks.items()}


def _returns_table(comparison: Comparison, rule: Rule, published: PublishedTable | None = None) -> list[list[str]]:
    """Raw returns by task and variant; with `published`, the paper's number under each."""
    variants = list(comparison.preset.variants)
    rows = [["task", "random", *map(comparison.label, variants), "data, mean", "data, best"]]
    for task, each in comparison.tasks.items():
        cells = [
            f"{getattr(each.carried[name].scores, rule):.1f}{comparison.remark(each.carried[name])}"
            if name in each.carried
            else ""
            for name in variants
        ]
        rows.append([task, f"{each.scale.random:.0f}", *cells, f"{each.data_mean:.0f}", f"{each.scale.best:.0f}"])
        if published is not None:
            paper = [published.text(task, comparison.preset.variants[name].paper_column) for name in variants]
            rows.append(["— the paper, its own scale", "", *paper, "", ""])
    return rows


def _normalised_table(comparison: Comparison, aggregates: Mapping[str, Any]) -> list[list[str]]:
    variants = list(comparison.preset.variants)
    rows = [["task", *map(comparison.label, variants)]]
    for task, each in comparison.tasks.items():
        cells = [
            f"{each.scale.estimate(each.carried[name].scores.mean):.1f}{comparison.remark(each.carried[name])}"
            if name in each.carried
            else ""
            for name in variants
        ]
        rows.append([task, *cells])
    together = comparison.title_of(comparison.tasks)
    for title, of in (("mean", "mean"), ("interquartile mean", "interquartile_mean")):
        rows.append(
            [
                f"{together}, {title}",
                *(str(getattr(aggregates[name], of)) if name in aggregates else "" for name in variants),
            ]
        )
    return rows


def _csv(comparison: Comparison) -> str:
    """Every single return: task, variant, training_seed, context, row, episode, return; chance as a variant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "variant", "training_seed", "context", "row", "episode", "return"])
    for task, each in comparison.tasks.items():
        for (row, episode), value in np.ndenumerate(each.chance):
            writer.writerow([task, "random", "", "none", row, episode, f"{value:.5g}"])
        for results in (each.carried, each.cleared):
            for name, result in results.items():
                for (seed, row, episode), value in np.ndenumerate(result.returns):
                    writer.writerow([task, name, result.seeds[seed], result.context, row, episode, f"{value:.5g}"])
    return text.getvalue()
