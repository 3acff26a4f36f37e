"""The table of ablations, from runs and evaluations that other entry points left."""

import csv
import json
from pathlib import Path

import pytest

from ring_rl.training.stage_records import StageRecord, write_stage_record

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def leave_results(load_script, monkeypatch):
    """Instead of running commands, notes them and leaves what a run and an evaluation would."""
    commands = []

    def fake(script, *overrides):
        commands.append((script, *overrides))
        values = dict(each.lstrip("+").split("=", 1) for each in overrides)
        if script.endswith("train_lm.py"):
            folder = Path(values["run_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            learned = values["lm_ablation"] == "none"
            write_stage_record(
                folder,
                StageRecord(
                    name="lines_8",
                    first_step=0,
                    last_step=60 if learned else 600,
                    tokens=100,
                    advanced=learned,
                    compile_seconds=1.0,
                    train_seconds=2.5,
                    resumed=values["seed"] == "1",
                ),
            )
            record = {"step": 60, "answer_accuracy": 1.0 if learned else 0.0}
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        else:
            output = Path(values["output"])
            output.mkdir(parents=True, exist_ok=True)
            score = {"value": 0.5, "low": 0.25, "high": 0.75, "count": 4}
            (output / "summary.json").write_text(json.dumps({"scores": [{"length": 64, "score": score}]}))

    monkeypatch.setattr(load_script("ablate_lm"), "run", fake)
    return commands


def overrides(folder, *more):
    return [f"runs={folder / 'runs'}", f"output={folder / 'results'}", "lengths=[64]", "samples=4", *more]


def test_every_change_is_trained_evaluated_and_tabulated(call_script, leave_results, tmp_path, capsys):
    call_script(
        "ablate_lm", *overrides(tmp_path, "ablations=[none,rotary]", "seeds=[0,1]", "train=['loop.log_every=5']")
    )
    scripts = [command[0] for command in leave_results]
    assert scripts == ["experiments/train_lm.py", "experiments/evaluate_lm.py"] * 4
    assert {"+lm_ablation=rotary", "seed=1", "loop.log_every=5"} <= set(leave_results[6])
    assert f"model.run_dir={tmp_path / 'runs' / 'rotary' / 'seed_1'}" in leave_results[7]
    rows = list(csv.DictReader((tmp_path / "results" / "ablations.csv").open()))
    assert [(row["ablation"], row["seed"], row["steps_lines_8"]) for row in rows] == [
        ("none", "0", "60"),
        ("none", "1", "60"),
        ("rotary", "0", "600"),
        ("rotary", "1", "600"),
    ]
    # The second was interrupted.
    assert [row["seconds"] for row in rows[:2]] == ["3.5", ""]
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| Rotary positions in every dimension | 0 | 600 (all) | 0.50 [0.25, 0.75] |" in table
    assert "The recipe of lm/line_retrieval_cpu as it is" in table
    assert "cells=4 reported=4" in capsys.readouterr().out


def test_a_table_of_what_there_is(call_script, leave_results, tmp_path):
    call_script("ablate_lm", *overrides(tmp_path, "ablations=[none]"))
    before = len(leave_results)
    call_script("ablate_lm", *overrides(tmp_path, "ablations=[none,rotary]", "report_only=true"))
    assert len(leave_results) == before
    assert len(list(csv.DictReader((tmp_path / "results" / "ablations.csv").open()))) == 1


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["ablations=[nonsense]"], "there is no ablation nonsense; choose among"),
        (["seeds=[]"], "seeds must name at least one"),
        (["report_only=true"], "is trained and evaluated; set report_only=false"),
    ],
)
def test_bad_input_is_one_line(call_script, refused, leave_results, tmp_path, more, complaint):
    assert complaint in refused(call_script, "ablate_lm", *overrides(tmp_path, *more))
    assert leave_results == []
    assert not (tmp_path / "results").exists()


def test_every_change_says_what_it_changes(load_script):
    script = load_script("ablate_lm")
    told = {path.stem: script.what_it_changes(path.stem) for path in script.CHANGES.glob("*.yaml")}
    assert len(set(told.values())) == len(told)
    assert all(told.values())
