"""Minari sets through the entry points: recorded by Minari's own tools, learnt from, and acted upon."""

import csv
import json
import warnings

import numpy as np
import pytest

pytest.importorskip("minari", reason="Minari data sets need minari")

import gymnasium
import minari

from ring_rl.agent.environments.recorded import ActionRange
from ring_rl.agent.evaluation.protocol import load_agent

TASK = "gymnasium/Pendulum-v1"
# Episodes shorter than Pendulum's own, so that a run takes seconds.
STEPS = 25
BRIEF = ["virtual_devices=1", "mesh.sp=1", "batch.batch_size=2", "loop.steps=2", "optimizer.warmup_steps=1"]
SMALL = ["agent.transformer.layers=1", "agent.transformer.width=16", "agent.chain.trajectories=2"]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A set of a random policy and of one that brakes, as Minari's collector records it; its returns are negative."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        warnings.simplefilter("ignore")  # of all that a card leaves out
        collector = minari.DataCollector(gymnasium.make("Pendulum-v1", max_episode_steps=STEPS))
        generator = np.random.default_rng(0)
        for episode in range(8):
            observation, _ = collector.reset(seed=episode)
            over, left = False, STEPS - episode  # a reset before the end truncates: episodes of several lengths
            while not over and left:
                action = generator.uniform(-2, 2, 1) if episode % 2 else -observation[2:]
                observation, _, terminated, truncated, _ = collector.step(np.clip(action, -2, 2).astype(np.float32))
                over, left = terminated or truncated, left - 1
        collector.create_dataset("made/pendulum-v0", algorithm_name="random and braking")
        collector.close()
    return root


@pytest.fixture
def train_on_pendulum(call_script, pendulum, monkeypatch):
    """Trains an agent on it for two steps."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(pendulum))

    def train(run_dir, agent, *overrides, task=TASK):
        data = ["data=minari", "data.dataset_id=made/pendulum-v0", f"task={task}", f"agent={agent}"]
        options = [f"run_dir={run_dir}", *BRIEF, "wandb.mode=disabled", *overrides]
        call_script("train_agent", *data, *options)

    return train


def test_a_set_of_minaris_own_collector_is_learnt_from_and_acted_upon(train_on_pendulum, call_script, tmp_path):
    runs = {"agentic_transformer": SMALL, "behaviour_cloning": ["agent.hidden_widths=[8]"]}
    for agent, small in runs.items():
        train_on_pendulum(tmp_path / agent, agent, *small)
    trained = load_agent(tmp_path / "agentic_transformer")
    assert (trained.task, trained.action_repeat) == (TASK, 1)
    assert trained.environment is not None
    assert trained.environment.action_range == ActionRange(low=(-2.0,), high=(2.0,))
    assert trained.model_config.episode_steps == trained.environment.max_episode_steps == STEPS
    assert trained.data_returns.max() < 0 < trained.model_config.normalisation.return_scale

    where = f"runs=[{','.join(str(tmp_path / agent) for agent in runs)}]"
    protocol = ["protocol.episodes=2", "protocol.rows=2", "protocol.target_fraction=1.0", "statistics.resamples=100"]
    call_script("evaluate_agent", where, f"output={tmp_path / 'out'}", *protocol)
    with (tmp_path / "out" / "returns.csv").open() as file:
        returns = [(row["agent"], float(row["return"])) for row in csv.DictReader(file)]
    assert {agent for agent, _ in returns} >= {"agentic_transformer", "behaviour_cloning"}
    # Pendulum pays between -16.3 and 0 a step.
    assert all(-16.3 * STEPS <= value < 0 for _, value in returns)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["task"] == TASK


def test_the_task_must_be_the_sets_environment(train_on_pendulum, refused, tmp_path):
    complaint = refused(train_on_pendulum, tmp_path, "behaviour_cloning", task="cartpole_swingup")
    assert complaint.endswith("was recorded in another task than cartpole_swingup; set task=gymnasium/Pendulum-v1")
    assert not (tmp_path / "checkpoints").exists()


def test_a_set_that_is_not_here_is_not_fetched_unasked(train_on_pendulum, refused, tmp_path):
    complaint = refused(train_on_pendulum, tmp_path, "behaviour_cloning", "data.dataset_id=mujoco/hopper/medium-v0")
    assert "here are: made/pendulum-v0; data.download=true fetches it" in complaint
