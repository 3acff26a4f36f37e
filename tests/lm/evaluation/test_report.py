"""Tables, pictures and summaries say what the records say."""

import csv
import json

import pytest

from ring_rl.lm.evaluation.plots import PublishedCurve, length_label
from ring_rl.lm.evaluation.report import PublishedCurves, ReportConfig, Subject, write_report

PUBLISHED = PublishedCurves(
    source="a paper, figure 1",
    differs=("everything",),
    curves=(PublishedCurve(label="theirs", lengths=(4096, 8192), accuracy=(0.9, 0.8)),),
)


@pytest.fixture
def subject():
    return Subject(name="ours", trained_length=4096, seed=0, settings={}, provenance={"commit": "abc"})


def config(**changes):
    return ReportConfig(**{"depth_bins": 4, "published": None, "effective_threshold": None, **changes})


def written(records, output, subject, *, suite="ruler", **changes):
    output.mkdir(exist_ok=True)
    return write_report(records, output, suite=suite, unit="tokens", subject=subject, config=config(**changes))


def table(path):
    lines = path.read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_modes_and_tasks_have_rows_of_their_own_and_lengths_columns(record, subject, tmp_path):
    records = [
        record(task=task, mode=mode, length=length, tokens=length - 96, index=index, score=float(index < right))
        for task, right in (("vt", 1), ("cwe", 3))
        for mode in ("generated", "teacher_forced")
        for length in (4096, 8192)
        for index in range(4)
        if (task, mode, length) != ("cwe", "teacher_forced", 8192)
    ]
    summary = written(records, tmp_path, subject)
    head, *rows = table(tmp_path / "table.md")
    assert head == ["task", "mode", "n", "4K", "8K"]
    found = {(row[0], row[1]): row[2:] for row in rows}
    assert found["vt", "generated"][:2] == ["4", "0.25 [0.05, 0.70]"]
    assert found["cwe", "teacher-forced"] == ["4", "0.75 [0.30, 0.95]", ""]
    assert found["mean tokens of a prompt", ""][1:] == ["4000", "8096"]
    # Of two tasks a row of lines would say of one what belongs to the other.
    assert len(rows) == 5
    assert summary["effective_length"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    with (tmp_path / "accuracy.csv").open() as file:
        by_hand = {(row["task"], row["mode"], row["length"]): float(row["score"]) for row in csv.DictReader(file)}
    assert by_hand["cwe", "generated", "8192"] == 0.75
    assert len(by_hand) == 7


def test_depths_become_a_heat_map_and_an_unplaced_answer_no_curve(record, subject, tmp_path):
    needles = [record(depth=depth, answer_depth=depth, index=index) for depth in (0.0, 1.0) for index in range(2)]
    written(needles, tmp_path / "needles", subject, published=PUBLISHED)
    unplaced = [record(answer_depth=None, items=None)]
    written(unplaced, tmp_path / "unplaced", subject)
    pictures = {folder: {path.stem for path in (tmp_path / folder).glob("*.png")} for folder in ("needles", "unplaced")}
    assert pictures["needles"] == {"accuracy_by_length", "accuracy_by_depth", "heat_map"}
    assert pictures["unplaced"] == {"accuracy_by_length"}


def test_the_effective_length_names_its_threshold_and_tasks(record, subject, tmp_path):
    records = [
        record(task=task, length=length, index=index, score=float(index < right))
        for task in ("vt", "cwe")
        for length, right in ((4096, 10), (8192, 9), (16384, 8))
        for index in range(10)
    ]
    effective = written(records, tmp_path, subject, effective_threshold=0.856)["effective_length"]
    assert (effective["threshold"], effective["tasks"]) == (0.856, ["cwe", "vt"])
    assert effective["generated"]["effective_length"] == 8192
    assert effective["generated"]["mean_by_length"] == {4096: 1.0, 8192: 0.9, 16384: 0.8}


def test_nothing_to_report_and_bad_reports_are_refused(subject, tmp_path):
    with pytest.raises(ValueError, match="no sample is answered yet"):
        written([], tmp_path, subject)
    with pytest.raises(ValueError, match="depth_bins must be at least 1"):
        config(depth_bins=0)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got 85.6"):
        config(effective_threshold=85.6)
    with pytest.raises(ValueError, match="theirs has 2 lengths and 1 accuracies"):
        PublishedCurve(label="theirs", lengths=(1, 2), accuracy=(0.5,))


def test_lengths_are_written_as_the_field_does():
    labels = [length_label(each) for each in (512, 4096, 102400, 1048576, 1536)]
    assert labels == ["512", "4K", "100K", "1M", "1.5K"]
