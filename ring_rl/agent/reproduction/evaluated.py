"""What an evaluation of a cell left, and of chance: returns as arrays, and where they came from."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ring_rl.agent.evaluation.policy import UniformPolicy
from ring_rl.agent.evaluation.protocol import ProtocolConfig, TrainedAgent, evaluate
from ring_rl.agent.reproduction.plan import Cell
from ring_rl.atomic_file import write_whole
from ring_rl.config import describe_differences, to_mapping
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.typing import Float64

__all__ = ["EvaluatedCell", "evaluate_cell", "evaluate_chance", "read_cell", "read_chance", "stale_reason"]

Environments = Callable[[int], Any]
"""action_repeat -> a vector environment with the protocol's rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluatedCell:
    """The returns of one cell under the protocol.

    Attributes:
        carried: With the context carried from episode to episode.
        cleared: With an empty context before every episode; None for an agent without one.
        context_episodes: Episodes that a context holds, after which it began anew.
        data_best: The best return of the data it was trained on.
        data_mean: Their mean.
        seconds: That the evaluation took.
    """

    carried: Float64[np.ndarray, "rows episodes"]
    cleared: Float64[np.ndarray, "rows episodes"] | None
    context_episodes: int
    data_best: float
    data_mean: float
    seconds: float


def evaluate_cell(cell: Cell, agent: TrainedAgent, environments: Environments, protocol: ProtocolConfig) -> None:
    """Rolls a trained cell out and writes its evaluation; one that is there is replaced.

    Raises:
        ValueError: The newest checkpoint is not that of the run's last step, as when it was cut off while saving it.
    """
    run = cell.run()
    if run is not None and run.last_step != agent.step:
        raise ValueError(
            f"{cell.run_dir} took {run.last_step} steps, its newest checkpoint is of step {agent.step}; move it away "
            "and train it again"
        )
    start = time.perf_counter()
    best = float(agent.data_returns.max())
    context_episodes = agent.policy().context_trajectories

    def returns(*, carry_context: bool) -> list[list[float]]:
        policy = agent.policy(action_selection=protocol.action_selection, seed=protocol.seed)
        vector = environments(agent.action_repeat)
        try:
            rollouts = evaluate(policy, vector, protocol, best_return=best, carry_context=carry_context)
            return rollouts.returns.tolist()
        finally:
            vector.close()

    record = {
        **_identity(protocol, step=agent.step),
        "task": cell.task,
        "variant": cell.variant,
        "seed": cell.seed,
        "carried": returns(carry_context=True),
        "cleared": returns(carry_context=False) if context_episodes > 1 else None,
        "context_episodes": context_episodes,
        "data": {
            "episodes": len(agent.data_returns),
            "mean": float(agent.data_returns.mean()),
            "best": best,
        },
        **_provenance(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_whole(cell.evaluation, json.dumps(record, indent=1) + "\n")


def evaluate_chance(path: Path, environments: Environments, protocol: ProtocolConfig, *, action_dim: int) -> None:
    """Rolls out uniformly random actions, a new one every control step, and writes their returns."""
    vector = environments(1)
    try:
        policy = UniformPolicy(action_dim=action_dim, seed=protocol.seed)
        returns = evaluate(policy, vector, protocol, best_return=1.0).returns
    finally:
        vector.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**_identity(protocol, step=0), "carried": returns.tolist(), **_provenance()}
    write_whole(path, json.dumps(record, indent=1) + "\n")


def stale_reason(path: Path, protocol: ProtocolConfig, *, step: int) -> str | None:
    """Why an evaluation must be made (again); None where it is there and is the one asked for."""
    if not path.exists():
        return "not evaluated"
    try:
        record = json.loads(path.read_text())
        differences = describe_differences(
            {key: record[key] for key in ("protocol", "step")}, _identity(protocol, step=step)
        )
    except (ValueError, KeyError) as error:
        return f"unreadable ({error})"
    return f"evaluated otherwise ({'; '.join(differences)})" if differences else None


def read_cell(path: Path) -> EvaluatedCell:
    """What `evaluate_cell` wrote.

    Raises:
        FileNotFoundError: The cell is not evaluated.
    """
    record = json.loads(path.read_text())
    cleared = record["cleared"]
    return EvaluatedCell(
        carried=np.array(record["carried"]),
        cleared=None if cleared is None else np.array(cleared),
        context_episodes=record["context_episodes"],
        data_best=record["data"]["best"],
        data_mean=record["data"]["mean"],
        seconds=record["seconds"],
    )


def read_chance(path: Path) -> Float64[np.ndarray, "rows episodes"]:
    """What `evaluate_chance` wrote."""
    return np.array(json.loads(path.read_text())["carried"])


def _identity(protocol: ProtocolConfig, *, step: int) -> dict[str, Any]:
    return {"protocol": to_mapping(protocol), "step": step}


def _provenance() -> dict[str, Any]:
    return {
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "flax", "dm_control", "mujoco"),
    }
