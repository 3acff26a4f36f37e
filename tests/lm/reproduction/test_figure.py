"""A figure's cells and tables from made-up runs and answers, against sums by hand."""

import csv
import dataclasses
import json

import pytest
import yaml

from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.evaluation.plots import PublishedCurve
from ring_rl.lm.evaluation.report import PublishedCurves
from ring_rl.lm.evaluation.sample_log import SampleLog
from ring_rl.lm.reproduction.plan import Claim, Measurement, PresetConfig, Variant
from ring_rl.lm.reproduction.report import read_points, write_figure_report

PUBLISHED = PublishedCurves(
    source="a paper", differs=(), curves=(PublishedCurve(label="theirs", lengths=(4096,), accuracy=(0.9,)),)
)
LENGTHS = (Measurement(tokens=1024, samples=4), Measurement(tokens=2048, samples=2))


def variant(label):
    return Variant(label=label, train=("loss.chunks=2",), evaluate=(), lengths=LENGTHS, expected_seconds=1.0)


@pytest.fixture
def preset():
    return PresetConfig(
        name="made_up",
        hardware="none",
        expectation="none",
        needs_weights=False,
        train=(),
        evaluate=(),
        mode="teacher_forced",
        variants={"good": variant("the good"), "bad": variant("the bad")},
        seeds=(0, 1),
        claims=(
            Claim(variant="good", tokens=1024, accuracy=0.875, minutes=2.0),
            Claim(variant="good", tokens=1024, accuracy=0.875, minutes=1.0),
            Claim(variant="bad", tokens=1024, accuracy=0.5, minutes=None),
        ),
    )


def right_answers(cell, length):
    """Of 4 at 1024 tokens and 2 at 2048, the good: all and 3, all; the bad: none, one."""
    good = cell.variant == "good"
    if length == 1024:
        return (4 - cell.seed) if good else 0
    return 2 if good else 1


@pytest.fixture
def cells(preset, tmp_path):
    made = list(preset.cells(tmp_path / "runs"))
    for cell in made:
        cell.run_dir.mkdir(parents=True)
        config = {"seed": cell.seed, "label": preset.variants[cell.variant].label, "stages": {"a": {}, "b": {}}}
        (cell.run_dir / "config.yaml").write_text(yaml.safe_dump({**config, "loss": {"chunks": 2}}))
        stage = {"last_step": 10, "tokens": 100, "advanced": True, "compile_seconds": 30.0, "train_seconds": 15.0}
        stages = {name: {**stage, "resumed": False} for name in ("a", "b")}
        (cell.run_dir / "stages.json").write_text(json.dumps(stages))
        identity = {"model": {"step": 10}}
        with SampleLog(
            cell.evaluation, record_type=SampleRecord, key=lambda record: record.key, identity=identity
        ) as log:
            for each in LENGTHS:
                log.append(
                    SampleRecord(
                        mode=mode,
                        task="compact_lines",
                        length=each.tokens,
                        depth=None,
                        index=index,
                        tokens=each.tokens - 5,
                        items=each.tokens // 9,
                        answer_depth=0.5,
                        # What was generated, and samples that are not asked for, must not count.
                        score=float(
                            mode == "teacher_forced" and index < min(right_answers(cell, each.tokens), each.samples)
                        ),
                        chance=9 / each.tokens,
                        answers=("1",),
                        output="1",
                        negative_log_likelihood=None,
                    )
                    for mode in ("teacher_forced", "generated")
                    for index in range(each.samples + 3)
                )
        summary = {"trained_length": 1024, "commit": "abc", "device": "cpu", "versions": {}}
        (cell.evaluation / "summary.json").write_text(json.dumps(summary))
    return made


def table(path):
    lines = path.read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_shares_are_those_of_the_samples_asked_for(preset, cells):
    points = read_points(preset, cells)
    good = points["good"][1024]
    assert {seed: share.value for seed, share in good.by_seed.items()} == {0: 1.0, 1: 0.75}
    assert (good.mean, good.pooled.value, good.pooled.count) == (0.875, 0.875, 8)
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


def test_what_is_left_of_a_cell(preset, cells):
    cell = cells[0]
    assert cell.trained
    assert cell.unanswered("teacher_forced") == ()
    more = [
        Measurement(tokens=1024, samples=7),
        Measurement(tokens=2048, samples=6),
        Measurement(tokens=4096, samples=1),
    ]
    grown = dataclasses.replace(cell, lengths=tuple(more))
    assert grown.unanswered("teacher_forced") == tuple(more[1:])
    # Answers of an earlier checkpoint are none of this one's.
    stages = json.loads((cell.run_dir / "stages.json").read_text())
    stages["b"]["last_step"] = 20
    (cell.run_dir / "stages.json").write_text(json.dumps(stages))
    assert cell.unanswered("teacher_forced") == LENGTHS
    del stages["b"]
    (cell.run_dir / "stages.json").write_text(json.dumps(stages))
    assert not cell.trained


def test_settings_that_a_preset_names_are_compared(preset, cells):
    assert cells[0].differing_settings(preset) == []
    other = dataclasses.replace(preset, train=("loss.chunks=4",))
    # The variant's own choice goes before that of all.
    assert cells[0].differing_settings(other) == []
    good = dataclasses.replace(preset.variants["good"], label="the best", train=("loss.chunks=4", "+experiment=some"))
    other = dataclasses.replace(preset, variants={**preset.variants, "good": good})
    assert cells[0].differing_settings(other) == [
        "label: saved the good, wanted the best",
        "loss.chunks: saved 2, wanted 4",
    ]
    assert cells[2].differing_settings(other) == []
