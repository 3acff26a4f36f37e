"""Agents compared under one protocol: the same tasks, resets, target and number of episodes for each."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ring_rl.agent.evaluation.policy import ModelPolicy, Policy
from ring_rl.agent.evaluation.rollout import Rollouts, reset_seeds, roll_out
from ring_rl.agent.evaluation.statistics import Scores, score
from ring_rl.agent.model import BehaviourCloningConfig, ModelConfig, SequenceModelConfig
from ring_rl.agent.td3_bc.networks import TD3BCConfig
from ring_rl.atomic_file import write_whole
from ring_rl.config import from_mapping
from ring_rl.training.checkpoint import load_for_evaluation
from ring_rl.training.statistics import estimate
from ring_rl.typing import Float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """How every agent is evaluated.

    Attributes:
        episodes: Episodes n in a row, in one context where the agent has one.
        rows: Environment seeds, each with a context of its own; at least 2, for an interval.
        seed: Which environment seeds.
        target_fraction: The return asked for, as a fraction of the data's best.
    """

    episodes: int
    rows: int
    seed: int
    target_fraction: float

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.rows < 2:
            raise ValueError(
                f"an evaluation needs at least 1 episode and 2 rows, got episodes={self.episodes}, rows={self.rows}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedAgent:
    """A checkpoint, ready to act.

    Attributes:
        label: The agent's name in tables.
        seed: Its training seed.
        task: What it was trained for.
        action_repeat: Control steps a decision.
        data_returns: The returns of all episodes of its data set.
        model_config: What its model was built from.
        parameters: Its arrays.
        step: Training steps it has seen.
    """

    label: str
    seed: int
    task: str
    action_repeat: int
    data_returns: Float64[np.ndarray, " E"]
    model_config: ModelConfig
    parameters: Any
    step: int

    def policy(self) -> ModelPolicy:
        """The agent acting, with an empty memory."""
        return ModelPolicy(self.model_config, self.parameters)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One agent's rollouts: one entry a training seed."""

    label: str
    seeds: tuple[int, ...]
    rollouts: tuple[Rollouts, ...]

    @property
    def returns(self) -> Float64[np.ndarray, "rows episodes"]:
        """Of all training seeds, one below the other."""
        return np.concatenate([each.returns for each in self.rollouts])

    @property
    def samples(self) -> Float64[np.ndarray, "samples episodes"]:
        """Independent samples: training seeds, averaged over their rows, where there are several; else rows."""
        if len(self.rollouts) == 1:
            return self.rollouts[0].returns
        return np.array([each.returns.mean(axis=0) for each in self.rollouts])

    @property
    def sample_kind(self) -> str:
        """What a sample is."""
        return "environment seeds" if len(self.rollouts) == 1 else "training seeds"

    @property
    def scores(self) -> Scores:
        """Over training seeds where there are several (each one's average counts once), else over rows."""
        if len(self.rollouts) == 1:
            return score(self.rollouts[0].returns)
        by_seed = [
            [each.returns.mean(), each.returns[:, -1].mean(), each.returns.max(axis=1).mean()] for each in self.rollouts
        ]
        return Scores(*(estimate(column) for column in np.array(by_seed).T))


def load_agent(run_directory: Path) -> TrainedAgent:
    """The newest checkpoint of a run, on whatever mesh it was trained.

    Raises:
        FileNotFoundError: The run has saved no checkpoint.
        ValueError: The checkpoint is not an agent's.
    """
    metadata, parameters = load_for_evaluation(run_directory / "checkpoints")
    kinds = {"sequence": SequenceModelConfig, "behaviour_cloning": BehaviourCloningConfig, "td3_bc": TD3BCConfig}
    kind = kinds.get(str(metadata.model_config.get("name")))
    if kind is None or "task" not in metadata.extra:
        raise ValueError(
            f"the checkpoint in {run_directory} is not an agent's; give runs of experiments/train_agent.py"
        )
    extra = metadata.extra
    return TrainedAgent(
        label=extra["label"],
        seed=extra["seed"],
        task=extra["task"],
        action_repeat=extra["action_repeat"],
        data_returns=np.array(extra["data_returns"], np.float64),
        model_config=from_mapping(kind, metadata.model_config, path="model"),
        parameters=parameters,
        step=metadata.step,
    )


def check_comparable(agents: Sequence[TrainedAgent]) -> None:
    """Raises ValueError unless all agents share task, action repeat and data set.

    Runs under one label count as training seeds of one agent, so they must differ in the seed and in nothing else.
    """
    first = agents[0]
    seen: dict[str, list[TrainedAgent]] = {}
    for agent in agents:
        for twin in seen.setdefault(agent.label, []):
            if agent.seed == twin.seed:
                raise ValueError(
                    f"two runs of {agent.label} have seed {agent.seed}; give each run once, each seed once"
                )
            if (agent.model_config, agent.step) != (twin.model_config, twin.step):
                raise ValueError(
                    f"two runs called {agent.label} differ in more than the seed (model or training steps); "
                    "evaluate them apart"
                )
        seen[agent.label].append(agent)
    for other in agents[1:]:
        for name in ("task", "action_repeat"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"{other.label} has {name}={getattr(other, name)}, {first.label} has {getattr(first, name)}; "
                    "evaluate agents of one task and one data set together"
                )
        if not np.array_equal(other.data_returns, first.data_returns):
            raise ValueError(f"{other.label} and {first.label} were trained on different data; evaluate them apart")


def evaluate(
    policy: Policy,
    environments: Any,
    protocol: ProtocolConfig,
    *,
    best_return: float,
    carry_context: bool = True,
    on_episode: Callable[[int], None] | None = None,
) -> Rollouts:
    """Rolls a policy out under the protocol; `best_return` is the data's."""
    return roll_out(
        policy,
        environments,
        seeds=reset_seeds(rows=protocol.rows, episodes=protocol.episodes, seed=protocol.seed),
        target_return=protocol.target_fraction * best_return,
        carry_context=carry_context,
        on_episode=on_episode,
    )


def write_returns(results: Sequence[Result], protocol: ProtocolConfig, path: Path) -> None:
    """Every single return as CSV: agent, training_seed, row, episode, reset_seed, return."""
    seeds = reset_seeds(rows=protocol.rows, episodes=protocol.episodes, seed=protocol.seed)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["agent", "training_seed", "row", "episode", "reset_seed", "return"])
    for result in results:
        for training_seed, rollouts in zip(result.seeds, result.rollouts, strict=True):
            for (row, episode), value in np.ndenumerate(rollouts.returns):
                writer.writerow([result.label, training_seed, row, episode, seeds[row, episode], f"{value:.6g}"])
    write_whole(path, text.getvalue())


def table_rows(results: Sequence[Result], data_returns: Float64[np.ndarray, " E"]) -> list[list[str]]:
    """The header and one row an agent, then the data, as text."""
    rows = [["agent", "mean of episodes", "last episode", "best episode", "samples"]]
    for result in results:
        scores = result.scores
        rows.append(
            [
                result.label,
                str(scores.mean),
                str(scores.last),
                str(scores.best),
                f"{scores.mean.seeds} {result.sample_kind}",
            ]
        )
    mean, p75, best = data_returns.mean(), np.quantile(data_returns, 0.75), data_returns.max()
    rows.append([f"data ({len(data_returns)} episodes)", f"{mean:.0f}", "", f"{best:.0f}", ""])
    rows.append(["data, 75th percentile", f"{p75:.0f}", "", "", ""])
    return rows
