"""A made-up figure: two models, two training seeds, answers whose sums are known."""

import json

import pytest
import yaml

from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.evaluation.sample_log import SampleLog
from ring_rl.lm.reproduction.plan import Claim, Measurement, PresetConfig, Variant
from ring_rl.training.stage_records import StageRecord, write_stage_record

LENGTHS = (Measurement(tokens=1024, samples=4), Measurement(tokens=2048, samples=2))


def variant(label):
    return Variant(label=label, train=("loss.z_loss=0.0",), evaluate=(), lengths=LENGTHS, expected_seconds=1.0)


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
        (cell.run_dir / "config.yaml").write_text(
            yaml.safe_dump({**config, "loss": {"chunks": 2, "z_loss": 0.0}, "mesh": {"sp": 1}})
        )
        for name in ("a", "b"):
            write_stage_record(
                cell.run_dir,
                StageRecord(
                    name=name,
                    first_step=0,
                    last_step=10,
                    tokens=100,
                    advanced=True,
                    compile_seconds=30.0,
                    train_seconds=15.0,
                    resumed=False,
                ),
            )
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
