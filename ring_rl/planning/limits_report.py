"""The table of longest contexts as CSV, Markdown, picture and summary."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ring_rl.atomic_file import write_whole
from ring_rl.config import to_mapping
from ring_rl.planning.compile_process import key_of
from ring_rl.planning.limits import Cell, CellResult, LimitsConfig, Row
from ring_rl.planning.probe_cache import ProbeCache
from ring_rl.training.plots import write_figure
from ring_rl.training.provenance import git_commit
from ring_rl.training.tables import csv_table, markdown_table

__all__ = ["OUTPUTS", "check_writable", "headline", "ratio", "table_rows", "write_limits"]

OUTPUTS = ("limits.csv", "probes.csv", "table.md", "limits.png", "summary.json")
_RATIO = ("ring", "blockwise")
_ESTIMATE = " (estimate)"


def check_writable(folder: Path) -> None:
    """Raises ValueError if results could not be written there: before hours of compiling, not after. Makes nothing."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(
            f"nothing can be written to {folder}, because {there} is no folder to write to; choose another"
        )


def table_rows(config: LimitsConfig, results: Mapping[Cell, CellResult]) -> list[list[str]]:
    """The header and a line a row: thousands of tokens, the paper's in brackets where it has them."""
    labels = [config.attentions[column].label for column in config.columns]
    with_ratio = set(_RATIO) <= set(config.columns)
    lines = [["machine", "model", *labels, *(["ring / blockwise"] if with_ratio else [])]]
    for row in config.rows:
        found = {column: results[Cell(row=row, attention=column)] for column in config.columns}
        machine = row.machine + (_ESTIMATE if next(iter(found.values())).plan.machine.estimated else "")
        line = [machine, row.model, *(_cell_text(config, each) for each in found.values())]
        if with_ratio:
            times = ratio(results, row)
            line.append("" if times is None else f"{times:,.0f}")
        lines.append(line)
    return lines


def ratio(results: Mapping[Cell, CellResult], row: Row) -> float | None:
    """Ring's context over blockwise's; None where one of them is missing or not final."""
    ring, blockwise = (results.get(Cell(row=row, attention=name)) for name in _RATIO)
    if ring is None or blockwise is None or not (ring.final and blockwise.final):
        return None
    return ring.context / blockwise.context if ring.context and blockwise.context else None


def headline(config: LimitsConfig, results: Mapping[Cell, CellResult]) -> str:
    """name=value, for programs to read."""
    done = [each for each in results.values() if each.final and not each.failure]
    values: dict[str, Any] = {"cells": f"{len(done)}/{len(results)}"}
    of_ring = [each for each in done if each.plan.cell.attention == "ring" and not each.plan.problem]
    compared = [(each.context or 0, config.published.tokens(each.plan.cell)) for each in of_ring]
    compared = [(ours, theirs) for ours, theirs in compared if theirs is not None]
    if compared:
        values["ring_at_least_paper"] = f"{sum(ours >= theirs for ours, theirs in compared)}/{len(compared)}"
    ratios = [(times, each.plan.machine.devices) for each in of_ring if (times := ratio(results, each.plan.cell.row))]
    if ratios:
        values["least_ring_to_blockwise_over_devices"] = f"{min(times / devices for times, devices in ratios):.2f}"
    if of_ring:
        values["longest_context"] = max(each.context or 0 for each in of_ring)
    return " ".join(f"{name}={value}" for name, value in values.items())


def write_limits(
    config: LimitsConfig, results: Mapping[Cell, CellResult], cache: ProbeCache, *, versions: Mapping[str, str]
) -> None:
    """All files of `OUTPUTS`, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    picture = config.output / "limits.png"
    write_whole(config.output / "limits.csv", csv_table(_cell_records(config, results)))
    write_whole(config.output / "probes.csv", csv_table(_probe_records(results)))
    write_whole(config.output / "table.md", markdown_table(table_rows(config, results)))
    if any(each.context for each in results.values()):
        write_figure(_draw(config, results), picture)
    else:
        # One of an earlier table would belie the others.
        picture.unlink(missing_ok=True)
    summary = {
        "config": {**to_mapping(config), "output": _shown(config.output), "probes": _shown(config.probes)},
        "headline": headline(config, results),
        "commit": git_commit(),
        "commits_of_probes": _commits(results, cache),
        "versions": dict(versions),
        "not_compiled": {str(cell): each.plan.problem for cell, each in results.items() if each.plan.problem},
        "failed": {str(cell): each.failure for cell, each in results.items() if each.failure},
        "compile_seconds": round(sum(each.compile_seconds for each in results.values()), 1),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def _shown(path: Path) -> str:
    """A path as results may name it, which are read on other machines: from here, or its last name only."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _cell_text(config: LimitsConfig, result: CellResult) -> str:
    theirs = config.published.tokens(result.plan.cell)
    if result.plan.problem:
        ours = "impossible"
    elif result.failure:
        ours = "failed" if result.context is None else f"{_thousands(result.context)} or more, then failed"
    elif result.context is None:
        # The shortest length of all was seen not to fit, or nothing was asked yet.
        ours = "none" if result.final else "?"
    else:
        ours = f"{_thousands(result.context)}{'' if result.final else ' or more'}"
        if result.final and result.failing_tokens_a_device is None:
            ours += " or more"
    return ours if theirs is None else f"{ours} ({_thousands(theirs)})"


def _thousands(tokens: int) -> str:
    return f"{tokens / 1024:,.0f}" if tokens >= 10240 else f"{tokens / 1024:g}"


def _cell_records(config: LimitsConfig, results: Mapping[Cell, CellResult]) -> list[dict[str, Any]]:
    records = []
    for cell, result in results.items():
        plan = result.plan
        shape = plan.request(plan.lengths[0])
        failing = result.known.get(result.failing_tokens_a_device or 0)
        at_limit = result.known.get(result.tokens_a_device or 0)
        records.append(
            {
                "machine": cell.row.machine,
                "model": cell.row.model,
                "attention": cell.attention,
                "estimate": plan.machine.estimated,
                "devices": plan.machine.devices,
                "memory_bytes": plan.machine.memory_bytes,
                "parameters": plan.parameters,
                "width": shape.model.transformer.width,
                "sequences": shape.batch_size,
                "context": result.context,
                "paper_context": config.published.tokens(cell),
                "tokens_a_device": result.tokens_a_device,
                "peak_bytes": result.peak_bytes,
                "state_bytes": at_limit and at_limit.state_bytes,
                "failing_tokens_a_device": result.failing_tokens_a_device,
                "failing_wanted_bytes": failing and (failing.wanted_bytes or failing.peak_bytes),
                "attention_block": at_limit and at_limit.attention_block,
                "probes": len(result.known),
                "compile_seconds": round(result.compile_seconds, 1),
                "final": result.final,
                "note": plan.problem or result.failure,
            }
        )
    return records


def _commits(results: Mapping[Cell, CellResult], cache: ProbeCache) -> list[str]:
    """Of the code that asked; the cache may hold probes of other tables."""
    probes = [
        cache.get(key_of(each.plan.request(length), each.plan.machine))
        for each in results.values()
        for length in each.known
    ]
    return sorted({probe.commit or "unknown" for probe in probes if probe is not None})


def _probe_records(results: Mapping[Cell, CellResult]) -> list[dict[str, Any]]:
    return [
        {
            "machine": cell.row.machine,
            "model": cell.row.model,
            "attention": cell.attention,
            "tokens_a_device": length,
            "context": result.plan.request(length).context,
            "fits": memory.fits(result.plan.machine.memory_bytes),
            "peak_bytes": memory.peak_bytes,
            "wanted_bytes": memory.wanted_bytes,
            "lower_seconds": round(memory.lower_seconds, 1),
            "compile_seconds": round(memory.compile_seconds, 1),
        }
        for cell, result in results.items()
        for length, memory in sorted(result.known.items())
    ]


def _draw(config: LimitsConfig, results: Mapping[Cell, CellResult]) -> Figure:
    """A group of bars a row; the paper's contexts as lines across them."""
    figure = Figure(figsize=(max(6.0, 1.6 + 1.25 * len(config.rows)), 4.4), layout="constrained")
    axes = figure.add_subplot()
    wide = 0.8 / len(config.columns)
    marked = False
    for index, column in enumerate(config.columns):
        cells = [results[Cell(row=row, attention=column)] for row in config.rows]
        places = [place - 0.4 + (index + 0.5) * wide for place in range(len(cells))]
        heights = [(each.context or 0) / 1024 for each in cells]
        # Of a cell that is not done nobody knows how much higher its bar is.
        hatches = ["" if each.final else "//" for each in cells]
        label = config.attentions[column].label
        axes.bar(places, heights, width=0.92 * wide, color=f"C{index}", label=label, hatch=hatches, edgecolor="white")
        for place, each in zip(places, cells, strict=True):
            theirs = config.published.tokens(each.plan.cell)
            if theirs is not None:
                label = "_nolegend_" if marked else "the paper"
                axes.hlines(theirs / 1024, place - wide / 2, place + wide / 2, color="black", lw=2, label=label)
                marked = True
    names = [f"{row.model}\n{re.sub('^gpu:', '', row.machine)}" for row in config.rows]
    names = [
        name + ("\nestimate" if results[Cell(row=row, attention=config.columns[0])].plan.machine.estimated else "")
        for name, row in zip(names, config.rows, strict=True)
    ]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_ylabel("longest context, thousands of tokens (of 1024)")
    axes.grid(axis="y", alpha=0.3)
    # Outside: a bar of any height may stand anywhere.
    figure.legend(fontsize=8, ncols=min(len(config.columns) + 1, 5), loc="outside lower center")
    return figure
