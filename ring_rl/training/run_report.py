"""A table of runs as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ring_rl.training.run_table import RunTable
from ring_rl.training.saved_runs import SavedRun
from ring_rl.training.tables import markdown_table

__all__ = ["markdown", "runs_csv", "setting_text", "table_csv"]


def table_csv(table: RunTable) -> str:
    """One line a configuration: settings, number of seeds, each metric's final and best with bounds, runs."""
    header = [*table.keys, "seeds"]
    for metric in table.goals:
        header += [f"{metric} {which}{bound}" for which in ("final", "best") for bound in ("", " low", " high")]
    lines = [[*header, "missing seeds", "runs"]]
    for row in table.rows:
        line = [*_cells(row.settings, table.keys), str(len(row.runs))]
        for metric in table.goals:
            for each in (row.final[metric], row.best[metric]):
                line += [repr(each.mean), *("" if np.isnan(x) else repr(x) for x in (each.low, each.high))]
        lines.append([*line, str(len(row.missing)), ";".join(str(run.path) for run in row.runs)])
    return _csv(lines)


def runs_csv(table: RunTable) -> str:
    """One line a run, those that do not count too: folder, problem, seed, last step, each metric's values."""
    names = [f"{metric} {which}" for metric in table.goals for which in ("final", "best")]
    lines = [["run", "problem", "seed", "last step", *names]]
    for row in table.rows:
        for seed, run in zip(row.seeds, row.runs, strict=True):
            values = [x for metric, goal in table.goals.items() for x in (run.final(metric), run.best(metric, goal))]
            lines.append([str(run.path), "", setting_text(seed), str(run.last_step), *map(repr, values)])
    for run in table.left_out:
        lines.append([str(run.path), str(run.problem), "", str(run.last_step), *[""] * len(names)])
    return _csv(lines)


def markdown(table: RunTable, *, digits: int = 4) -> str:
    """The table for people: mean [95% interval] over seeds, then what is left out and why, and who made it."""
    header = [*table.keys, "seeds"]
    for metric, goal in table.goals.items():
        header += [f"{metric}, final", f"{metric}, {'lowest' if goal == 'minimize' else 'highest'}"]
    lines = [header]
    for row in table.rows:
        seeds = f"{len(row.runs)} of {len(row.runs) + len(row.missing)}" if row.missing else str(len(row.runs))
        cells = [*_cells(row.settings, table.keys), seeds]
        for metric in table.goals:
            cells += [f"{row.final[metric]:.{digits}g}", f"{row.best[metric]:.{digits}g}"]
        lines.append(cells)
    notes = ["Mean over seeds and 95% interval (Student's t)."]
    if single := sum(len(row.runs) == 1 for row in table.rows):
        notes.append(f"{single} of {len(table.rows)} rows have one seed and no interval.")
    below = ["", " ".join(notes)]
    if table.left_out:
        below += ["", f"Not counted, {len(table.left_out)} of {len(table.left_out) + _counted(table)} runs:", ""]
        below += [f"- `{run.path}`{_settings(run, table)}: {run.problem}" for run in table.left_out]
    below += ["", " ".join(_provenance(table))]
    return markdown_table(lines) + "\n".join(below) + "\n"


def _settings(run: SavedRun, table: RunTable) -> str:
    """ " (key=value, ...)": what the run would have been a row of."""
    keys = [key for key in (*table.keys, table.seed_key) if key in run.config]
    return f" ({', '.join(f'{key}={setting_text(run.config[key])}' for key in keys)})" if keys else ""


def _provenance(table: RunTable) -> list[str]:
    starts = [start for row in table.rows for run in row.runs for start in run.starts]
    lines = []
    for name in ("commit", "device"):
        values = sorted({str(start.get(name)) for start in starts})
        lines.append(f"Trained with {name}: {', '.join(values) or 'not recorded'}.")
    if unrecorded := sum(not run.starts for row in table.rows for run in row.runs):
        lines.append(f"{unrecorded} of {_counted(table)} runs recorded neither.")
    return lines


def _counted(table: RunTable) -> int:
    return sum(len(row.runs) for row in table.rows)


def _cells(settings: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [setting_text(settings[key]) if key in settings else "" for key in keys]


def setting_text(value: Any) -> str:
    """A setting's value as a table shows it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
