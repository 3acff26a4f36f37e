"""Every number that is shown can be traced to a committed file, and follows from it."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from ring_rl.agent.statistics import score

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "experiments" / "results"


def table(path):
    """A Markdown table as {first cell: other cells}."""
    lines = path.read_text().strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in cells}


def test_readme_shows_the_committed_tables():
    run = subprocess.run(
        [sys.executable, "experiments/update_tables.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"<!-- table: \S+ -->\n\|", (REPOSITORY / "README.md").read_text())) == 3


def test_the_demo_table_follows_from_its_single_returns():
    with (RESULTS / "demo" / "returns.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = table(RESULTS / "demo" / "table.md")
    summary = json.loads((RESULTS / "demo" / "summary.json").read_text())
    for agent in {row["agent"] for row in rows}:
        mine = [row for row in rows if row["agent"] == agent]
        returns = np.full([1 + max(int(row[name]) for row in mine) for name in ("row", "episode")], np.nan)
        for row in mine:
            returns[int(row["row"]), int(row["episode"])] = float(row["return"])
        scores = score(returns)
        assert shown[agent] == [
            str(scores.mean),
            str(scores.last),
            str(scores.best),
            f"{scores.mean.seeds} environment seeds",
        ]
        np.testing.assert_allclose(summary["scores"][agent]["mean"]["mean"], scores.mean.mean, rtol=1e-4)
    for name in ("commit", "device", "versions", "protocol"):
        assert summary[name]


def test_the_memory_table_follows_from_its_measurements():
    with (RESULTS / "memory_by_ring_size" / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = table(RESULTS / "memory_by_ring_size" / "table.md")
    for row in rows:
        total = int(row["argument_bytes"]) + int(row["temporary_bytes"])
        assert shown[row["ring_size"]][1] == f"{total / 2**20:.1f}"
