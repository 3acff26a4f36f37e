import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ring_rl.training.run import MAY_DIFFER
from ring_rl.training.stage_records import StageRecord, write_stage_record

REPOSITORY = Path(__file__).parents[2]
OUTPUTS = {"table.csv", "table.md", "runs.csv", "summary.json", "loss_curves.png", "loss_final.png"}


@pytest.fixture
def runs(tmp_path):
    """Two learning rates, three seeds each, of which one was stopped."""
    for rate in (0.1, 0.2):
        for seed in range(3):
            run = tmp_path / "runs" / f"rate_{rate}" / f"seed_{seed}"
            run.mkdir(parents=True)
            config = {"seed": seed, "run_dir": str(run), "optimizer": {"learning_rate": rate}, "loop": {"steps": 4}}
            (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            last = 2 if (rate, seed) == (0.2, 2) else 4
            records = [{"step": step, "loss": rate / step + seed, "return": 10 * seed} for step in range(1, last + 1)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            (run / "starts.jsonl").write_text(json.dumps({"step": 0, "commit": "abc", "device": "1 x cpu"}) + "\n")
    return tmp_path / "runs"


@pytest.fixture
def collect(call_script, runs, tmp_path):
    def call(*overrides):
        call_script("collect", f"runs=[{runs}]", f"output={tmp_path / 'out'}", *overrides, config_name="collect_runs")
        return tmp_path / "out"

    return call


def test_runs_become_one_table(collect, runs, capsys):
    output = collect()
    assert {path.name for path in output.iterdir()} == OUTPUTS
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "configurations=2 runs=6 counted=5 left_out=1 loss=0.55"
    with (output / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer.learning_rate"] for row in rows] == ["0.2", "0.1"]
    assert [(row["seeds"], row["missing seeds"]) for row in rows] == [("2", "1"), ("3", "0")]
    # Seeds 0, 1, 2 give 0.025, 1.025, 2.025: the standard error is 1/sqrt(3), t of 2 degrees of freedom 4.3027.
    assert float(rows[1]["loss final"]) == pytest.approx(1.025)
    assert float(rows[1]["loss final high"]) == pytest.approx(1.025 + 4.3027 / math.sqrt(3), rel=1e-4)
    table = (output / "table.md").read_text()
    stopped = runs / "rate_0.2" / "seed_2"
    assert f"- `{stopped}` (optimizer.learning_rate=0.2, seed=2): stopped at step 2 of 4" in table
    assert "Trained with commit: abc. Trained with device: 1 x cpu." in table
    summary = json.loads((output / "summary.json").read_text())
    assert summary["left_out"] == {str(stopped): "stopped at step 2 of 4"}


def test_metrics_that_are_better_when_larger(collect, capsys):
    output = collect("maximize=[return]", "minimize=[]")
    assert {path.name for path in output.iterdir()} >= {"return_curves.png", "return_final.png"}
    assert capsys.readouterr().out.splitlines()[-1].endswith(" return=10")


def test_one_configuration_has_no_settings_to_draw_against(collect, runs, call_script):
    output = collect(f"runs=[{runs}/rate_0.1]")
    assert {path.name for path in output.iterdir()} == OUTPUTS - {"loss_final.png"}


def test_a_table_is_replaced_only_when_asked(collect, refused):
    output = collect()
    (output / "table.md").write_text("mine")
    assert "choose another output or set overwrite=true" in refused(collect)
    assert (output / "table.md").read_text() == "mine"
    collect("overwrite=true")
    assert (output / "table.md").read_text() != "mine"


def test_a_run_in_stages_counts_when_all_of_them_are_over(collect, runs):
    """As those of language models: how many steps they take is known at their end only."""
    for run in runs.glob("*/*"):
        config = yaml.safe_load((run / "config.yaml").read_text())
        del config["loop"]
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "stages": {"short": {"steps": 9}, "long": {}}}))
        for number, name in enumerate(["short", "long"] if run.name != "seed_1" else ["short"]):
            record = StageRecord(
                name=name,
                first_step=2 * number,
                last_step=2 * number + 2,
                tokens=1,
                advanced=True,
                compile_seconds=1.0,
                train_seconds=1.0,
                resumed=False,
            )
            write_stage_record(run, record)
    (runs / "rate_0.1" / "seed_2" / "stages.json").write_text("{")
    left_out = json.loads((collect() / "summary.json").read_text())["left_out"]
    damaged = left_out.pop(str(runs / "rate_0.1" / "seed_2"))
    assert "stages.json is damaged" in damaged
    assert left_out == {
        str(runs / f"rate_{rate}" / "seed_1"): "stopped at step 4 with long not finished" for rate in (0.1, 0.2)
    }


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("runs=[nowhere]", "no folder nowhere"),
        ("runs=[]", "give runs=[path,...]"),
        ("minimize=[]", "no metrics to collect"),
        ("maximize=[loss]", "loss stands in minimize and in maximize"),
        ("largest_curve_count=0", "largest_curve_count must be at least 1"),
        ("minimize=[los]", "it has no metric los; its metrics are loss, return"),
        ("steps_key=steps", "its configuration has no steps"),
        ("keys=[]", "add optimizer.learning_rate to keys"),
        ("keys=[seed]", "seed in keys is no setting of these runs, or is ignored"),
        ("keys=[rate]", "rate in keys is no setting of these runs, or is ignored; the settings that differ are optim"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(collect, refused, tmp_path, override, complaint):
    assert complaint in refused(collect, override)
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_trainer_is_collected(train, call_script, tmp_path, capsys):
    """What training writes is what the table reads."""
    for seed in (0, 1):
        train(
            tmp_path / "runs" / f"seed_{seed}", f"seed={seed}", "agent=behaviour_cloning", "loop.steps=2", small=False
        )
    capsys.readouterr()
    call_script("collect", f"runs=[{tmp_path / 'runs'}]", f"output={tmp_path / 'out'}", config_name="collect_runs")
    assert "configurations=1 runs=2 counted=2 left_out=0" in capsys.readouterr().out.splitlines()[-1]
    assert "not recorded" not in (tmp_path / "out" / "table.md").read_text()


def test_what_is_ignored_are_keys_of_the_trainer_and_all_that_say_nothing_about_a_result():
    """Another mesh or number of microbatches is a comparison that people make, so those stay."""
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        ignored = compose("collect_runs").ignore
        trainer = compose("train_agent")
    for key in ignored:
        assert OmegaConf.select(trainer, key, default="absent") != "absent", key
    assert set(MAY_DIFFER) - {"mesh", "parallel", "accumulation_steps"} <= set(ignored)


def test_the_script_runs_from_the_command_line(runs, tmp_path):
    command = [sys.executable, "experiments/collect.py", f"runs=[{runs}]", f"output={tmp_path / 'out'}"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1].startswith("configurations=2 ")
