"""Every combination that a sweep of conf/sweep/ names is a configuration that trains, in a folder of its own."""

import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.training.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
SWEEPS = sorted((REPOSITORY / "conf" / "sweep").glob("*.yaml"))
RUN_DIR = "run_dir=experiments/runs/sweep/${oc.env:WANDB_SWEEP_ID}/${oc.env:WANDB_RUN_ID}"
CONTINUOUS = {"uniform": float, "log_uniform_values": float, "int_uniform": int}


def load(path):
    return yaml.safe_load(path.read_text())


def values_of(parameter):
    """All values of a grid, both ends of a range, as wandb would give them."""
    if "values" in parameter:
        assert set(parameter) == {"values"}
        return parameter["values"]
    assert set(parameter) == {"distribution", "min", "max"}
    number = CONTINUOUS[parameter["distribution"]]
    assert parameter["min"] < parameter["max"]
    assert all(type(parameter[end]) is number or number is float for end in ("min", "max"))
    return [number(parameter["min"]), number(parameter["max"])]


def combinations(sweep):
    names = list(sweep["parameters"])
    for values in itertools.product(*(values_of(sweep["parameters"][name]) for name in names)):
        yield dict(zip(names, values, strict=True))


def command(sweep, combination, **replaced):
    """The command that wandb's agent runs, macros expanded by wandb's own functions and the agent's one rule."""
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in combination.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    expanded = []
    for chunk in create_sweep_command(list(sweep["command"])):
        expanded += macros[chunk[2:-1]] if chunk.startswith("${") and chunk.endswith("}") else [chunk]
    return expanded


def overrides(sweep, combination):
    env, interpreter, program, *rest = command(sweep, combination)
    assert (env, interpreter, program) == ("/usr/bin/env", "python", "experiments/train_agent.py")
    return rest


@pytest.fixture
def inside_a_sweep(monkeypatch):
    """What wandb's agent sets for each run; `inside_a_sweep(id)` begins another run."""

    def run(run_id):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)

    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    run("run1")
    return run


def test_there_are_sweeps():
    assert {path.stem for path in SWEEPS} >= {"optimizer", "context_length", "seeds"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_combination_composes(path, load_script, inside_a_sweep):
    sweep = load(path)
    assert set(sweep) == {"program", "project", "method", "metric", "parameters", "command"}
    config_class = load_script("train_agent").TrainAgentConfig
    seen = []
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        for combination in combinations(sweep):
            resolved = resolve(compose("train_agent", overrides=overrides(sweep, combination)))
            resolved.pop("experiment", None)
            config = from_mapping(config_class, resolved)
            assert config.run_dir == Path("experiments/runs/sweep/sweep1/run1")
            assert config.wandb.mode == "online"
            assert config not in seen
            seen.append(config)
    assert len(seen) >= 15


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_no_two_runs_share_a_folder_and_none_has_one_by_chance(path, inside_a_sweep, monkeypatch):
    """wandb expands ${envvar:...} too early, with the id of the run before; the run itself must resolve its id."""
    sweep = load(path)
    assert RUN_DIR in overrides(sweep, next(combinations(sweep)))
    assert sweep["command"].count(RUN_DIR) == 1
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        composed = compose("train_agent", overrides=[RUN_DIR])
        inside_a_sweep("run2")
        assert resolve(composed)["run_dir"] == "experiments/runs/sweep/sweep1/run2"
        monkeypatch.delenv("WANDB_RUN_ID")
        with pytest.raises(ValueError, match=r"'run_dir' cannot be resolved.*WANDB_RUN_ID"):
            resolve(composed)


def test_a_sweep_run_trains_logs_its_metric_and_goes_on_where_it_was_cut_off(
    data_root, tmp_path, inside_a_sweep, call_script
):
    """The optimizer sweep's command with one combination, small; then again, as after a preemption."""
    sweep = load(REPOSITORY / "conf" / "sweep" / "optimizer.yaml")
    given = overrides(sweep, next(combinations(sweep)))
    small = ["agent=behaviour_cloning", "batch.batch_size=2", "loop.log_every=1", "loop.checkpoint_every=2"]
    small += ["loop.steps=4", "wandb.mode=disabled", f"data.root={data_root}"]
    folders = [text.replace("experiments/runs", str(tmp_path)) for text in given]
    call_script("train_agent", *folders, *small)
    run = tmp_path / "sweep" / "sweep1" / "run1"
    first = read_metrics(run / "metrics.jsonl")
    for path in SWEEPS:
        assert all(load(path)["metric"]["name"] in record for record in first), path
    # What a kill after step 3 leaves.
    (run / "checkpoints" / "4").rename(tmp_path / "lost")
    call_script("train_agent", *folders, *small)
    again = read_metrics(run / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in again] == [(r["step"], r["loss"]) for r in first]
    assert (run / "metrics.superseded.jsonl").exists()
