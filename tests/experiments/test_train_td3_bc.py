"""agent=td3_bc through the entry point that trains every agent."""

import json

import jax
import numpy as np
import pytest

from ring_rl.agent.chain_batch import empty_batch
from ring_rl.agent.evaluation.policy import ModelPolicy
from ring_rl.agent.evaluation.protocol import load_agent

BRIEF = [
    "agent=td3_bc",
    "agent.hidden_widths=[8,8]",
    "agent.updates_per_step=4",
    "batch.batch_size=8",
    "loop.steps=6",
    "loop.checkpoint_every=2",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def train_td3_bc(call_script, data_root):
    """Trains small networks for a few steps; more overrides win."""
    return lambda run, *more: call_script("train_agent", f"run_dir={run}", f"data.root={data_root}", *BRIEF, *more)


@pytest.fixture(scope="module")
def finished_run(train_td3_bc, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("td3_bc") / "run"
    train_td3_bc(run)
    return run


def test_a_run_is_laid_out_as_every_agents(finished_run):
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "gradient_norm", "value", "actor_loss", "imitation_error", "learning_rate"} <= set(lines[0])
    for name in ("config.yaml", "compiled.json", "checkpoints/6", "plots/learning_curve.png"):
        assert (finished_run / name).exists(), name


def test_going_on_gives_the_uninterrupted_run_to_the_bit(train_td3_bc, finished_run, tmp_path):
    train_td3_bc(tmp_path / "parts")
    # What a kill after step 5 leaves.
    (tmp_path / "parts" / "checkpoints" / "6").rename(tmp_path / "lost")
    train_td3_bc(tmp_path / "parts")
    whole, parts = load_agent(finished_run), load_agent(tmp_path / "parts")
    assert parts.step == 6
    jax.tree.map(np.testing.assert_array_equal, whole.parameters, parts.parameters)


def test_a_trained_agent_acts_by_its_actor_alone(finished_run):
    agent = load_agent(finished_run)
    assert (agent.label, agent.task, agent.action_repeat) == ("td3_bc", "cartpole_swingup", 4)
    policy = ModelPolicy(agent.model_config, agent.parameters)
    assert policy.context_trajectories == 1
    observations = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    now = empty_batch(batch_size=3, steps=1, observation_dim=5, action_dim=1)._replace(
        observations=observations[:, None]
    )
    policy.begin(3)
    first = policy.act(now)
    policy.observe(now)
    np.testing.assert_array_equal(policy.act(now), first)

    x = (observations - agent.model_config.normalisation.observation_mean) / (
        agent.model_config.normalisation.observation_scale
    )
    layers = agent.parameters["actor"]["layers"]
    for index in range(3):
        x = x @ layers[index]["kernel"] + layers[index]["bias"]
        x = np.maximum(x, 0) if index < 2 else np.tanh(x)
    np.testing.assert_allclose(first, x, rtol=1e-4, atol=1e-5)


def test_a_dry_run_says_what_a_step_needs(train_td3_bc, tmp_path, capsys):
    train_td3_bc(tmp_path / "run", "dry_run=true")
    last = dict(pair.split("=") for pair in capsys.readouterr().out.splitlines()[-1].split())
    actor, critic = (5 * 8 + 8) + (8 * 8 + 8) + (8 + 1), (6 * 8 + 8) + (8 * 8 + 8) + (8 + 1)
    assert int(last["parameters"]) == actor + 2 * critic
    assert last["tokens_per_step"] == str(4 * 8)
    # By hand, two FLOPs a weight: critics 16 of one each time; an actor update every other time.
    weights_of_actor, weights_of_critic = 5 * 8 + 8 * 8 + 8, 6 * 8 + 8 * 8 + 8
    flops = 4 * (2 * weights_of_actor + 16 * weights_of_critic) + 2 * (6 * weights_of_actor + 4 * weights_of_critic)
    assert int(last["model_flops_per_step"]) == 8 * flops
    # Parameters, targets and two moments each, in float32.
    assert int(last["state_bytes"]) >= 4 * 4 * (actor + 2 * critic)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("mesh.sp=2", "one device, the mesh has sp=2; set mesh.sp=1"),
        ("accumulation_steps=2", "accumulation_steps=2; set 1"),
        ("agent.updates_per_step=5", "agent.updates_per_step=5 must be a positive multiple of actor_delay=2; use 6"),
        ("batch.batch_size=0", "batch.batch_size must be at least 1, got 0"),
        ("agent.learning.discount=1.0", "discount must lie in"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_made(train_td3_bc, refused, tmp_path, override, complaint):
    assert complaint in refused(train_td3_bc, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()
