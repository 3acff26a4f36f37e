"""Every number that is shown can be traced to a committed file, and follows from it."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ring_rl.agent.evaluation.results import read_returns
from ring_rl.agent.evaluation.statistics import RULES

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "experiments" / "results"


def table(path):
    """A Markdown table as {first cell: other cells}."""
    lines = path.read_text().strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in cells}


def test_pages_show_the_committed_tables(load_script):
    run = subprocess.run(
        [sys.executable, "experiments/update_tables.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    shown = {page: (REPOSITORY / page).read_text() for page in load_script("update_tables").PAGES}
    for page, text in shown.items():
        assert len(re.findall(r"<!-- table: \S+ -->\n\|", text)) == text.count("<!-- table: "), page
    assert shown["README.md"].count("<!-- table: ") >= 3
    assert "<!-- table: experiments/results/memory_by_option/table.md -->" in shown["ring_rl/training/README.md"]


def test_an_old_table_is_named_and_replaced_and_a_missing_one_changes_nothing(load_script, monkeypatch, tmp_path):
    script = load_script("update_tables")
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    monkeypatch.setattr(script, "PAGES", ("a.md", "b.md"))
    (tmp_path / "table.md").write_text("| new |\n")
    page = "before\n<!-- table: table.md -->\n{}<!-- end of table -->\nafter\n"
    (tmp_path / "a.md").write_text(page.format("| old |\n"))
    (tmp_path / "b.md").write_text(page.format("| new |\n"))

    def update(*options):
        monkeypatch.setattr(sys, "argv", ["update_tables.py", *options])
        script.main()

    with pytest.raises(SystemExit, match=r"^error: a\.md shows old tables; run python experiments/update_tables\.py$"):
        update("--check")
    assert "old" in (tmp_path / "a.md").read_text()
    update()
    assert (tmp_path / "a.md").read_text() == (tmp_path / "b.md").read_text() == page.format("| new |\n")
    update("--check")

    (tmp_path / "table.md").write_text("| newer |\n")
    (tmp_path / "b.md").write_text(page.replace("table.md", "gone.md").format(""))
    with pytest.raises(SystemExit, match=r"^error: there is no gone\.md, which a page shows"):
        update()
    assert "newer" not in (tmp_path / "a.md").read_text()


def test_the_demo_table_follows_from_its_single_returns():
    shown = table(RESULTS / "demo" / "table.md")
    summary = json.loads((RESULTS / "demo" / "summary.json").read_text())
    for result in read_returns(RESULTS / "demo" / "returns.csv"):
        mean, last, best = (getattr(result.scores, rule) for rule in RULES)
        cells = shown[result.name]
        assert cells[:3] == [str(mean), str(last), str(best)]
        assert cells[-1] == f"{mean.seeds} {result.sample_kind}"
        np.testing.assert_allclose(summary["scores"][result.name]["mean"]["mean"], mean.mean, rtol=1e-4)
    for name in ("commit", "device", "versions", "protocol"):
        assert summary[name]


def test_the_memory_table_follows_from_its_measurements():
    with (RESULTS / "memory_by_ring_size" / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = table(RESULTS / "memory_by_ring_size" / "table.md")
    for row in rows:
        total = int(row["argument_bytes"]) + int(row["temporary_bytes"])
        assert shown[row["ring_size"]][1] == f"{total / 2**20:.1f}"


def test_the_options_table_follows_from_its_measurements():
    with (RESULTS / "memory_by_option" / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = table(RESULTS / "memory_by_option" / "table.md")
    assert list(shown) == [row["name"] for row in rows]
    plain = int(rows[0]["needed_bytes"])
    for row in rows:
        needed = int(row["needed_bytes"])
        assert shown[row["name"]] == [
            f"{int(row['tokens']):,}",
            f"{needed / 2**20:,.0f}",
            f"{100 * needed / plain:.0f}%",
        ]
    summary = json.loads((RESULTS / "memory_by_option" / "summary.json").read_text())
    assert summary["commit"]
    config, needed = summary["config"], {row["name"]: int(row["needed_bytes"]) for row in rows}
    assert (config["tokens"], config["devices"]) == (131072, 8)
    # All options together: each of them has its share, and eight times the context fits where the plain model did.
    together = needed["all together"]
    assert all(size > together for name, size in needed.items() if name.startswith("all but: "))
    assert needed["all together, 8 x the context"] <= plain


def test_the_engine_table_follows_from_its_rounds():
    result = json.loads((RESULTS / "engine" / "cpu" / "engine.json").read_text())
    seconds = {name: np.array(values) for name, values in result["seconds_a_step"].items()}
    # The ratio is the median over rounds, in each of which both met the same state of the machine.
    ratio, wait = np.median(seconds["engine"] / seconds["bare"]), np.median(result["input_waits"])
    bare, engine = table(RESULTS / "engine" / "cpu" / "table.md").values()
    assert bare == [f"{1e3 * np.median(seconds['bare']):.1f}", "1.000", ""]
    assert engine == [f"{1e3 * np.median(seconds['engine']):.1f}", f"{ratio:.3f}", f"{100 * wait:.2f}%"]
    assert len(seconds["engine"]) == len(seconds["bare"]) == result["config"]["rounds"] >= 3
    assert result["commit"]
    # The engine costs less than a twentieth of a step, and its input keeps up.
    assert ratio < 1.05
    assert wait < 0.02
