"""A figure's tables from made-up runs and answers, against sums by hand."""

import csv
import json

from ring_rl.lm.evaluation.plots import PublishedCurve
from ring_rl.lm.evaluation.report import PublishedCurves
from ring_rl.lm.reproduction.report import read_points, write_figure_report

PUBLISHED = PublishedCurves(
    source="a paper", differs=(), curves=(PublishedCurve(label="theirs", lengths=(4096,), accuracy=(0.9,)),)
)


def table(path):
    lines = path.read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_shares_are_those_of_the_samples_asked_for(preset, cells):
    points = read_points(preset, cells)
    good = points["good"][1024]
    assert {seed: share.value for seed, share in good.by_seed.items()} == {0: 1.0, 1: 0.75}
    # Both seeds were asked the same four questions: there are no eight.
    assert (good.mean, good.pooled.value, good.pooled.count) == (0.875, 0.875, 4)
    assert points["bad"][1024].mean == 0
    assert points["bad"][2048].mean == 0.5
    assert (good.tokens, good.lines) == (1019, 113)


def test_tables_csv_and_claims(preset, cells, tmp_path):
    figures = write_figure_report(preset, cells, published=PUBLISHED, output=tmp_path / "out")
    assert figures["claims_that_hold"] == "1/3"
    assert (figures["good_2048"], figures["bad_2048"]) == ("1.000", "0.500")
    head, *rows = table(tmp_path / "out" / "table.md")
    assert head == ["model (teacher-forced)", "seeds", "1K", "2K"]
    assert rows[0] == ["the good", "2 of 2", "0.875 (0.750 to 1.000)", "1.000 (1.000 to 1.000)"]
    claims = table(tmp_path / "out" / "claims.md")[1:]
    # Two stages of 45 seconds.
    assert [row[1:] for row in claims] == [
        ["0.875", "2 x 4", "1.5", "yes"],
        ["0.875", "2 x 4", "1.5", "no"],
        ["0.000", "2 x 4", "1.5", "no"],
    ]
    training = table(tmp_path / "out" / "training.md")[1:]
    assert training[0] == ["the good", "0", "10", "200", "60", "30", "2 of 2"]
    with (tmp_path / "out" / "accuracy.csv").open() as file:
        lines = {(row["variant"], row["seed"], row["length"]): row for row in csv.DictReader(file)}
    assert float(lines["good", "1", "1024"]["accuracy"]) == 0.75
    assert len(lines) == 8
    assert (tmp_path / "out" / "accuracy_by_length.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_its_own_interval_and_a_missing_one_is_said(preset, cells, tmp_path):
    write_figure_report(preset, cells[:1], published=PUBLISHED, output=tmp_path / "out")
    rows = table(tmp_path / "out" / "table.md")[1:]
    assert rows[0] == ["the good", "1 of 2", "1.000 [0.510, 1.000]", "1.000 [0.342, 1.000]"]
    assert not any(row[0] == "the bad" for row in rows)


def test_an_interrupted_training_is_not_called_fast(preset, cells, tmp_path):
    stages = json.loads((cells[0].run_dir / "stages.json").read_text())
    stages["b"]["resumed"] = True
    (cells[0].run_dir / "stages.json").write_text(json.dumps(stages))
    assert cells[0].training_seconds is None
    write_figure_report(preset, cells, published=PUBLISHED, output=tmp_path / "out")
    assert table(tmp_path / "out" / "claims.md")[1][3:] == ["not timed: interrupted", "no"]
