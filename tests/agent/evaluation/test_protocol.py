import dataclasses

import numpy as np
import pytest

from ring_rl.agent.evaluation.protocol import (
    FIRST_TUNING_SEED,
    ProtocolConfig,
    TrainedAgent,
    check_comparable,
    check_context,
    shuffled_counterparts,
    target_return,
)
from ring_rl.agent.evaluation.rollout import reset_seeds

PROTOCOL = ProtocolConfig(
    episodes=3,
    rows=2,
    seed=0,
    target_fraction=0.85,
    other_target_fractions=(0.7,),
    action_selection="mode",
    full_context="refuse",
)


@pytest.fixture
def agent(chains):
    def make(label="at", seed=0, **changes):
        settings = {"name": "agentic_transformer", "chain": {"order": "ascending", "trajectories": 3}}
        made = TrainedAgent(
            label=label,
            seed=seed,
            task="cartpole_swingup",
            action_repeat=4,
            data_returns=np.array([1.0, 2.0]),
            model_config=chains.sequence_config(),
            parameters=None,
            step=10,
            settings=settings,
        )
        return dataclasses.replace(made, **changes)

    return make


def settings(order="ascending", **changes):
    return {"name": "agentic_transformer", "chain": {"order": order, "trajectories": 3, **changes}}


def test_tuning_and_reporting_share_no_reset():
    tuning = dataclasses.replace(PROTOCOL, seed=FIRST_TUNING_SEED)
    assert (PROTOCOL.purpose, tuning.purpose) == ("reporting", "tuning")
    most = {"rows": 1000, "episodes": 100}
    reported = reset_seeds(**most, seed=FIRST_TUNING_SEED - 1)
    assert reported.max() < reset_seeds(**most, seed=FIRST_TUNING_SEED).min()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"episodes": 0}, "at least 1 episode and 2 rows, got episodes=0"),
        ({"rows": 1}, "at least 1 episode and 2 rows"),
        ({"seed": -1}, r"protocol\.seed must be at least 0, got -1"),
        ({"rows": 100_000}, "100000 rows of 3 episodes need more than the 100003 resets"),
        ({"other_target_fractions": (0.85,)}, r"different finite numbers, got \[0\.85, 0\.85\]"),
        ({"target_fraction": float("inf")}, "different finite numbers"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(PROTOCOL, **changes)


def test_targets_are_parts_of_the_best():
    assert PROTOCOL.target_fractions == (0.85, 0.7)
    assert target_return(200.0, 0.85) == 170.0
    assert target_return(-5.0, 1.0) == -5.0
    with pytest.raises(ValueError, match=r"best return is -5, of which 0\.85 is no sensible target"):
        target_return(-5.0, 0.85)


def test_training_seeds_differ_in_the_seed_and_in_nothing_else(agent):
    check_comparable([agent(seed=0), agent(seed=1), agent("dt", settings=settings(trajectories=1))])
    with pytest.raises(ValueError, match="two runs of at have seed 0"):
        check_comparable([agent(), agent()])
    for changes in ({"step": 11}, {"settings": settings("shuffled")}):
        with pytest.raises(ValueError, match="two runs called at differ in more than the seed"):
            check_comparable([agent(seed=0), agent(seed=1, **changes)])
    with pytest.raises(ValueError, match="bc has action_repeat=1, at has 4"):
        check_comparable([agent(), agent("bc", action_repeat=1)])
    with pytest.raises(ValueError, match="trained on different data"):
        check_comparable([agent(), agent("bc", data_returns=np.array([1.0]))])


def test_the_control_of_an_agent_differs_in_the_order_of_its_chains_only(agent):
    agents = [
        agent(),
        agent(seed=1),
        agent("shuffled", settings=settings("shuffled")),
        agent("longer, shuffled", settings=settings("shuffled", trajectories=4)),
        agent("older", settings={}),
    ]
    assert shuffled_counterparts(agents) == {"at": "shuffled"}


def test_contexts_that_are_too_short_are_refused_or_begin_anew(agent):
    check_context([agent()], PROTOCOL)
    longer = dataclasses.replace(PROTOCOL, episodes=4)
    with pytest.raises(ValueError, match="4 episodes do not fit into one context of 3, which at has"):
        check_context([agent()], longer)
    check_context([agent()], dataclasses.replace(longer, full_context="begin_anew"))
