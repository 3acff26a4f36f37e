"""Agents as conf/agent/ has them: which settings are refused, and that the others reach the model."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.agent.agents import BehaviourCloningAgentConfig, SequenceAgentConfig, model_config
from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def agents():
    """(name, overrides) -> the agent that experiments/train_agent.py would train."""

    def compose_agent(name, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            agent = resolve(compose("train_agent", overrides=[f"agent={name}", *overrides]))["agent"]
        kind = BehaviourCloningAgentConfig if name == "behaviour_cloning" else SequenceAgentConfig
        return from_mapping(kind, agent, path="agent")

    return compose_agent


def test_every_agent_takes_every_head(agents):
    for name in ("agentic_transformer", "decision_transformer", "behaviour_cloning"):
        assert agents(name).action_head.name == "squared_error"
    for path in (CONF / "action_head").glob("*.yaml"):
        override = f"action_head@agent.action_head={path.stem}"
        assert agents("decision_transformer", override).action_head.name == path.stem
        assert agents("behaviour_cloning", override).action_head.name == path.stem


def test_settings_reach_the_model(agents, chains):
    agent = dataclasses.replace(
        agents("agentic_transformer", "action_head@agent.action_head=mixture"),
        token_layout="return_state_action",
        time_embedding="learned",
        trajectory_embedding=False,
        embedding_dropout=0.1,
    )
    model = model_config(agent, chains.episode_set(5))
    shared = {field.name for field in dataclasses.fields(agent)} & {field.name for field in dataclasses.fields(model)}
    shared.remove("name")
    assert shared >= {"token_layout", "time_embedding", "trajectory_embedding", "embedding_dropout", "action_head"}
    assert {name: getattr(model, name) for name in shared} == {name: getattr(agent, name) for name in shared}
    assert (model.trajectories, model.episode_steps) == (4, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dropout": 1.0}, r"agent.embedding_dropout must lie in \[0, 1\), got 1.0"),
        ({"time_octaves": -1}, "agent.time_octaves must be at least 0, got -1"),
        (
            {"previous_step_in_token": True, "token_layout": "return_state_action"},
            "previous_step_in_token=true is for token_layout=fused; return_state_action has tokens .* set it to false",
        ),
        ({"name": "decision_transformer"}, "a decision transformer reads one trajectory"),
    ],
)
def test_settings_that_mean_nothing_are_refused(agents, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(agents("agentic_transformer"), **changes)
