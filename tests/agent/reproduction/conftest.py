"""A small comparison whose cells were never trained: their evaluations are written by hand."""

import json

import numpy as np
import pytest

from ring_rl.agent.evaluation.protocol import ProtocolConfig
from ring_rl.agent.reproduction.plan import InContextConfig, Ordering, PresetConfig, Variant
from ring_rl.config import to_mapping

TASKS = ("cartpole_swingup", "jaco_reach_top_left")
EPISODES, ROWS = 3, 4


def variant(label, column=None):
    return Variant(label=label, train=(f"agent={label}",), paper_column=column, expected_seconds=10.0)


@pytest.fixture
def preset():
    return PresetConfig(
        name="made_up",
        hardware="nothing",
        expectation="guessed",
        data="collect",
        collect={"cartpole": (), "jaco": ()},
        train=("data=rnd",),
        tasks={"cartpole_swingup": (), "jaco_reach_top_left": ("data.action_repeat=1",)},
        variants={"long": variant("long", "AT"), "shuffled": variant("shuffled"), "clone": variant("clone", "BC")},
        seeds=(0, 1, 2),
        workers=1,
        protocol=ProtocolConfig(
            episodes=EPISODES,
            rows=ROWS,
            seed=0,
            target_fraction=1.0,
            other_target_fractions=(),
            action_selection="mode",
            full_context="begin_anew",
        ),
        orderings=(Ordering(better="long", worse="clone"), Ordering(better="clone", worse="long")),
        in_context=InContextConfig(carried="long", shuffled="shuffled"),
        bootstrap_samples=500,
    )


def write_evaluation(path, preset, *, carried, cleared=None, best=100.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "protocol": to_mapping(preset.protocol),
        "step": 5,
        "carried": np.asarray(carried).tolist(),
        "cleared": None if cleared is None else np.asarray(cleared).tolist(),
        "context_episodes": EPISODES if cleared is not None else 1,
        "data": {"episodes": 7, "mean": 30.0, "best": best},
        "commit": "abc",
        "device": "none",
        "versions": {"python": "3"},
        "seconds": 1.0,
    }
    path.write_text(json.dumps(record))


@pytest.fixture
def evaluated(preset, tmp_path):
    """Runs folder and chance: chance 10, the clone 30, the long one 50, which gains 20 from its context."""
    generator = np.random.default_rng(0)
    noise = lambda: generator.normal(size=(ROWS, EPISODES))  # noqa: E731
    level = {"long": 50.0, "shuffled": 40.0, "clone": 30.0}
    gain = np.array([0.0] + [20.0] * (EPISODES - 1))
    for cell in preset.cells(tmp_path / "runs"):
        carried = level[cell.variant] + noise() + (gain if cell.variant == "long" else 0)
        cleared = None if cell.variant == "clone" else level[cell.variant] + noise()
        write_evaluation(cell.evaluation, preset, carried=carried, cleared=cleared)
    chance = {task: tmp_path / "runs" / task / "chance.json" for task in preset.tasks}
    for path in chance.values():
        write_evaluation(path, preset, carried=np.full((ROWS, EPISODES), 10.0))
    return tmp_path / "runs", chance
