"""The table from one command: presets that can be run, prices, and a whole comparison in small."""

import dataclasses
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from flax import nnx
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from ring_rl.agent.agents import SequenceAgentConfig, sequence_model_config
from ring_rl.agent.exploration.collection import CollectionConfig
from ring_rl.agent.model import make_model
from ring_rl.agent.reproduction.evaluated import evaluate_cell
from ring_rl.agent.reproduction.published import PublishedTable
from ring_rl.agent.tokens import Normalisation
from ring_rl.agent.work import model_flops
from ring_rl.config import from_mapping, to_mapping
from ring_rl.hydra_config import resolve

REPOSITORY = Path(__file__).parents[2]

PRESETS = sorted(path.stem for path in (REPOSITORY / "conf" / "preset").glob("*.yaml"))


def composed(config_name, overrides=()):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return resolve(compose(config_name, overrides=list(overrides)))


@pytest.fixture(params=PRESETS)
def preset(request, load_script):
    mapping = composed("reproduce_agent", [f"preset={request.param}"])
    return from_mapping(load_script("reproduce_agent").ReproduceAgentConfig, mapping).preset


def test_every_cell_of_a_preset_is_a_training_that_can_be_configured(preset, load_script):
    """A typo in a preset must not be found by its hundredth cell."""
    config_class = load_script("train_agent").TrainAgentConfig
    for variant in preset.variants.values():
        for task, overrides in preset.tasks.items():
            mapping = composed(
                "train_agent", [*preset.train, *variant.train, *overrides, f"task={task}", f"label='{variant.label}'"]
            )
            mapping.pop("experiment", None)
            mapping.pop("attention", None)
            config = from_mapping(config_class, mapping)
            assert (config.task, config.label) == (task, variant.label)


def test_an_estimate_from_flops_is_no_less_than_they_take(preset, load_script):
    """Evaluation comes on top, so a price that training alone exceeds is wrong."""
    rate = re.search(r"estimated from FLOPs at (\d+) TFLOP/s( a GPU)?", preset.expectation)
    if rate is None:
        assert preset.expectation == "measured"
        return
    devices = int(preset.hardware.split()[0]) if rate[2] else 1
    for variant in preset.variants.values():
        mapping = composed("train_agent", [*preset.train, *variant.train])
        if mapping["agent"]["name"] not in ("agentic_transformer", "decision_transformer"):
            continue
        agent = from_mapping(SequenceAgentConfig, mapping["agent"])
        steps, batch_size = agent.chain.trajectories * 1000, mapping["batch"]["batch_size"]
        model = sequence_model_config(
            agent, episode_steps=1000, observation_dim=24, action_dim=6, normalisation=Normalisation.identity(24)
        )
        parameters = nnx.split(nnx.eval_shape(lambda model=model: make_model(model, nnx.Rngs(0))))[1]
        flops = mapping["loop"]["steps"] * model_flops(model, parameters, batch_size=batch_size, steps=steps)
        assert variant.expected_seconds >= flops / (devices * float(rate[1]) * 1e12), variant.label


def test_rewards_are_computed_for_the_very_data_that_are_trained_on(preset, load_script):
    for task, overrides in preset.tasks.items():
        script = load_script("reproduce_agent")
        mapping = composed("relabel", [f"task={task}", *script.data_overrides(preset, task)])
        trained = composed("train_agent", [*preset.train, *overrides, f"task={task}"])
        assert mapping["data"] == trained["data"]


def test_every_collection_of_a_preset_can_be_configured(preset, tmp_path):
    for domain, overrides in preset.collect.items():
        config = from_mapping(CollectionConfig, composed("collect", [*overrides, f"root={tmp_path}"]))
        assert config.folder == tmp_path / domain / "rnd"


def test_the_papers_numbers_cover_the_presets_tasks_and_columns(preset):
    published = from_mapping(PublishedTable, composed("reproduce_agent")["published"])
    for task in preset.tasks:
        for variant in preset.variants.values():
            if variant.paper_column is not None:
                assert published.of(task, variant.paper_column) is not None


def test_the_averages_of_the_papers_table_come_out():
    """Its own row of averages, as a check of what was typed."""
    published = from_mapping(PublishedTable, composed("reproduce_agent")["published"])
    averages = {"BC-10%": 36.11, "DT": 45.51, "AT 32 (blockwise)": 111.13, "AT 128 (ring)": 113.66}
    for column, average in averages.items():
        values = [row[column] for row in published.returns.values()]
        assert sum(values) / len(values) == pytest.approx(average, abs=0.01)


def test_a_price_is_named_before_anything_starts(call_script, capsys, tmp_path):
    call_script("reproduce_agent", "dry_run=true", f"runs={tmp_path}/runs", f"data_root={tmp_path}/data")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    figures = dict(pair.split("=") for pair in last.split())
    assert figures["cells"] == figures["left"]
    assert float(figures["hours_left"]) > 0
    assert not (tmp_path / "runs").exists()


def test_a_command_that_fails_stops_the_rest(load_script, tmp_path):
    (tmp_path / "command.py").write_text("raise SystemExit(3)")
    with pytest.raises(ChildProcessError, match="exit code 3; the same command again goes on from here"):
        load_script("reproduce_agent").run(str(tmp_path / "command.py"))


@pytest.fixture
def finished(load_script, tmp_path):
    """A configuration of two cells, and what training and evaluating them leaves, written by hand."""
    mapping = composed("reproduce_agent", [f"runs={tmp_path}/runs", f"output={tmp_path}/results"])
    preset = mapping["preset"]
    preset["tasks"] = {"cartpole_swingup": []}
    preset["variants"] = {"td3_bc": preset["variants"]["td3_bc"]}
    preset["variants"]["td3_bc"]["train"] = ["agent=td3_bc", "loop.steps=10", "optimizer.learning_rate=1e-3"]
    preset |= {"seeds": [0, 1], "orderings": [], "in_context": None}
    config = from_mapping(load_script("reproduce_agent").ReproduceAgentConfig, mapping)
    identity = {"protocol": to_mapping(config.preset.protocol)}
    for cell in config.cells:
        cell.run_dir.mkdir(parents=True)
        run = {"task": cell.task, "seed": cell.seed, "label": "TD3+BC", "mesh": {"sp": 8}, "wandb": {"mode": "online"}}
        run |= {"loop": {"steps": 10}, "optimizer": {"learning_rate": 0.001}, "virtual_devices": 2}
        (cell.run_dir / "config.yaml").write_text(yaml.safe_dump(run))
        (cell.run_dir / "metrics.jsonl").write_text(json.dumps({"step": 10, "loss": 1.0}) + "\n")
        cell.evaluation.write_text(json.dumps({**identity, "step": 10, "seconds": 1.0}))
    config.chance("cartpole_swingup").write_text(json.dumps({**identity, "step": 0}))
    return config


def test_a_run_of_other_settings_is_no_cell_of_the_preset(finished, load_script):
    """A preset that changed after a cell was trained must not report that cell as its own."""
    script = load_script("reproduce_agent")
    script.check_settings(finished)
    cell = finished.cells[1]
    config = yaml.safe_load((cell.run_dir / "config.yaml").read_text())
    (cell.run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"optimizer": {"learning_rate": 0.002}}))
    with pytest.raises(ValueError, match=r"seed_1 was trained .*learning_rate: saved 0.002, wanted 0.001"):
        script.reproduce(finished)


def test_cells_that_were_evaluated_otherwise_are_left_to_do(finished, load_script):
    script = load_script("reproduce_agent")
    assert script.left_to_do(finished) == []
    longer = dataclasses.replace(finished.preset.protocol, episodes=9)
    changed = dataclasses.replace(finished, preset=dataclasses.replace(finished.preset, protocol=longer))
    assert script.left_to_do(changed) == changed.cells
    with pytest.raises(ValueError, match=r"2 of 2 cells are not finished.*protocol.episodes: saved 8, wanted 9"):
        script.report(dataclasses.replace(changed, partial=True))
    finished.cells[0].evaluation.write_text("{")
    assert script.left_to_do(finished) == finished.cells[:1]
    script.announce(finished)


def test_chance_under_another_protocol_is_not_reported(finished, load_script):
    finished.chance("cartpole_swingup").write_text(json.dumps({"protocol": {}, "step": 0}))
    with pytest.raises(ValueError, match=r"evaluate chance first: phases=\[evaluate\]"):
        load_script("reproduce_agent").report(finished)


@pytest.mark.simulator
def test_a_partial_comparison_evaluates_what_is_trained(finished, load_script):
    pytest.importorskip("dm_control", reason="needs the extra `simulator`")
    script = load_script("reproduce_agent")
    cell = finished.cells[0]
    (cell.run_dir / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": 1.0}) + "\n")
    with pytest.raises(ValueError, match=r"stopped at step 9 of 10; train it first"):
        script.evaluate(finished)
    script.evaluate(dataclasses.replace(finished, partial=True))
    assert script.left_to_do(finished) == [cell]


def test_an_agent_of_before_the_last_step_is_not_evaluated(finished):
    """Cut off between the last step's metrics and its checkpoint."""
    agent: Any = types.SimpleNamespace(step=5)
    environments: Any = None
    with pytest.raises(ValueError, match="took 10 steps, its newest checkpoint is of step 5"):
        evaluate_cell(finished.cells[0], agent, environments, finished.preset.protocol)


@pytest.mark.simulator
def test_a_comparison_from_nothing_to_its_tables(load_script, tmp_path, capfd):
    """Two agents, two seeds, one task: collected, trained, evaluated, reported; then nothing is left to do."""
    pytest.importorskip("dm_control", reason="needs the extra `simulator`")
    script = load_script("reproduce_agent")
    mapping = composed("reproduce_agent", [f"runs={tmp_path}/runs", f"output={tmp_path}/results"])
    small = ["loop.steps=2", "loop.checkpoint_every=2", "loop.log_every=1", "optimizer.warmup_steps=1"]
    mapping["data_root"] = str(tmp_path / "data")
    mapping["preset"] |= {
        "collect": {"cartpole": ["task=cartpole_balance", "explorer=noise", "algorithm=rnd", "episodes=6"]},
        "tasks": {"cartpole_swingup": []},
        "variants": {
            "at": {
                "label": "AT, 2 trajectories",
                "train": ["agent=agentic_transformer", "agent.chain.trajectories=2", "batch.batch_size=1", *small],
                "paper_column": "AT 32 (blockwise)",
                "expected_seconds": 1.0,
            },
            "bc": {
                "label": "BC-10%",
                "train": ["agent=behaviour_cloning", "batch.batch_size=1", *small],
                "paper_column": "BC-10%",
                "expected_seconds": 1.0,
            },
        },
        "seeds": [0, 1],
        "workers": 1,
        "orderings": [{"better": "at", "worse": "bc"}],
        "in_context": None,
        "bootstrap_samples": 100,
    }
    mapping["preset"]["protocol"] |= {"episodes": 2, "rows": 2}
    config = from_mapping(script.ReproduceAgentConfig, mapping)
    with pytest.raises(ValueError, match=r"train it first: phases=\[train\]"):
        script.evaluate(config)
    script.reproduce(config)
    figures = dict(pair.split("=") for pair in capfd.readouterr().out.strip().splitlines()[-1].split())
    assert figures["cells"] == "4"
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["training_seeds"] == {"cartpole_swingup/at": 2, "cartpole_swingup/bc": 2}
    # The data were collected for another task of the domain and relabelled.
    record = json.loads((tmp_path / "data" / "cartpole" / "rnd" / "collection.json").read_text())
    assert record["settings"]["task"] == "cartpole_balance"
    config_of_run = yaml.safe_load((tmp_path / "runs/cartpole_swingup/at/seed_1/config.yaml").read_text())
    assert config_of_run["label"] == "AT, 2 trajectories"
    assert script.left_to_do(config) == []
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("evaluation.json")}
    script.evaluate(config)
    assert {path: path.stat().st_mtime_ns for path in made} == made
