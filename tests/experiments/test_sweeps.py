"""Every combination that a sweep of conf/sweep/ names is a configuration that trains, in a folder of its own."""

import itertools
import os
import signal
from pathlib import Path

import pytest
import wandb
import yaml
from hydra import compose, initialize_config_dir
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.training.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
SWEEPS = sorted((REPOSITORY / "conf" / "sweep").glob("*.yaml"))
RUN_DIR = "run_dir=experiments/runs/sweep/${oc.env:WANDB_SWEEP_ID}/${oc.env:WANDB_RUN_ID}"
# Each entry point that sweeps run, and its configuration.
PROGRAMS = {
    "experiments/train_agent.py": ("train_agent", "TrainAgentConfig"),
    "experiments/train_lm.py": ("train_lm", "TrainLmConfig"),
}
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
    assert (env, interpreter, program) == ("/usr/bin/env", "python", sweep["program"])
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
    assert {path.stem for path in SWEEPS} >= {"optimizer", "context_length", "seeds", "agent"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_combination_composes(path, load_script, inside_a_sweep):
    sweep = load(path)
    assert set(sweep) == {"program", "project", "method", "metric", "parameters", "command"}
    script, config_name = PROGRAMS[sweep["program"]]
    config_class = getattr(load_script(script), config_name)
    seen = []
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        for combination in combinations(sweep):
            resolved = resolve(compose(script, overrides=overrides(sweep, combination)))
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
        composed = compose(PROGRAMS[sweep["program"]][0], overrides=[RUN_DIR])
        inside_a_sweep("run2")
        assert resolve(composed)["run_dir"] == "experiments/runs/sweep/sweep1/run2"
        monkeypatch.delenv("WANDB_RUN_ID")
        with pytest.raises(ValueError, match=r"'run_dir' cannot be resolved.*WANDB_RUN_ID"):
            resolve(composed)


def test_a_preempted_run_is_handed_back_to_the_sweep_and_goes_on(
    data_root, tmp_path, inside_a_sweep, call_script, monkeypatch
):
    """The optimizer sweep's command with one combination, small; wandb's side is played by a stand-in."""
    told = []
    preempt = False

    class Run:
        def log(self, metrics, step):
            nonlocal preempt
            if preempt:
                # Once: a second signal ends a run without saving.
                preempt = False
                os.kill(os.getpid(), signal.SIGTERM)

        def mark_preempting(self):
            told.append("preempting")

        def finish(self, exit_code):
            told.append(exit_code)

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    sweep = load(REPOSITORY / "conf" / "sweep" / "optimizer.yaml")
    given = [text.replace("experiments/runs", str(tmp_path)) for text in overrides(sweep, next(combinations(sweep)))]
    small = ["agent=behaviour_cloning", "batch.batch_size=2", "loop.log_every=1", "loop.steps=6"]
    # The command's own wandb.mode=online stays.
    small += [f"data.root={data_root}", "virtual_devices=1", "mesh.sp=1"]

    def train():
        call_script("train_agent", *given, *small)

    def metrics(run):
        return read_metrics(tmp_path / "sweep" / "sweep1" / run / "metrics.jsonl")

    train()
    assert told == [0]
    for path in SWEEPS:
        if load(path)["program"] != sweep["program"]:
            continue
        assert all(load(path)["metric"]["name"] in record for record in metrics("run1")), path

    inside_a_sweep("run2")
    preempt = True
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == 130
    assert told == [0, "preempting", 1]
    assert len(metrics("run2")) < 6
    train()
    assert told == [0, "preempting", 1, 0]
    losses = [[(record["step"], record["loss"]) for record in metrics(run)] for run in ("run1", "run2")]
    assert losses[0] == losses[1]
