"""Agents compared under one protocol: the same tasks, resets, target and number of episodes for each."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ring_rl.agent.environments.recorded import RecordedEnvironment
from ring_rl.agent.evaluation.policy import ActionSelection, ModelPolicy, Policy
from ring_rl.agent.evaluation.rollout import SEED_STRIDE, Rollouts, reset_seeds, roll_out
from ring_rl.agent.model import BehaviourCloningConfig, ModelConfig, SequenceModelConfig
from ring_rl.agent.td3_bc.networks import TD3BCConfig
from ring_rl.config import from_mapping
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.checkpoint import load_for_evaluation
from ring_rl.typing import Float64

FullContext = Literal["refuse", "begin_anew"]

# Seeds below are for results that are shown, seeds from here on for choosing settings: both never see one reset.
FIRST_TUNING_SEED = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """How every agent is evaluated.

    Attributes:
        episodes: Episodes n in a row, in one context where the agent has one.
        rows: Environment seeds, each with a context of its own; at least 2, for an interval.
        seed: Which environment seeds: 0 to 99 for results that are shown, 100 and more for choosing settings.
        target_fraction: The return asked for, as a fraction of the data's best: the one whose scores count, named
            before any is seen.
        other_target_fractions: Targets that are evaluated, too, and reported beside it.
        action_selection: Whether a stochastic agent takes the "mode" of its distribution or a "sample".
        full_context: What is done with an agent whose context holds fewer episodes: "refuse" it, or let it
            "begin_anew", with an empty context whenever it is full, so that chains of several lengths are compared.
    """

    episodes: int
    rows: int
    seed: int
    target_fraction: float
    other_target_fractions: tuple[float, ...]
    action_selection: ActionSelection
    full_context: FullContext

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.rows < 2:
            raise ValueError(
                f"an evaluation needs at least 1 episode and 2 rows, got episodes={self.episodes}, rows={self.rows}"
            )
        if self.seed < 0:
            raise ValueError(f"protocol.seed must be at least 0, got {self.seed}")
        if self.rows * self.episodes > SEED_STRIDE:
            raise ValueError(
                f"{self.rows} rows of {self.episodes} episodes need more than the {SEED_STRIDE} resets that a "
                "protocol seed has; lower one of them"
            )
        fractions = self.target_fractions
        if len(set(fractions)) < len(fractions) or not all(map(math.isfinite, fractions)):
            raise ValueError(
                f"target_fraction and other_target_fractions must be different finite numbers, got {list(fractions)}"
            )

    @property
    def target_fractions(self) -> tuple[float, ...]:
        """All targets, the one whose scores count first."""
        return (self.target_fraction, *self.other_target_fractions)

    @property
    def purpose(self) -> Literal["reporting", "tuning"]:
        """What this protocol's resets may be used for."""
        return "tuning" if self.seed >= FIRST_TUNING_SEED else "reporting"


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
        settings: The configuration it was trained by, `agent` of conf/train_agent.yaml; empty if unknown.
        environment: What its data set recorded of an environment that is none of ours; None for one of ours.
    """

    label: str
    seed: int
    task: str
    action_repeat: int
    data_returns: Float64[np.ndarray, " E"]
    model_config: ModelConfig
    parameters: Any
    step: int
    settings: Mapping[str, Any]
    environment: RecordedEnvironment | None = None

    @property
    def reads_returns(self) -> bool:
        """Whether it is told a target return; of others the evaluation is the same for every target."""
        return isinstance(self.model_config, SequenceModelConfig)

    def policy(
        self,
        *,
        action_selection: ActionSelection = "mode",
        seed: int = 0,
        parallel: SequenceParallel | None = None,
    ) -> ModelPolicy:
        """The agent acting, with an empty memory; `seed` is that of sampled actions, `parallel` shares the memory."""
        return ModelPolicy(
            self.model_config, self.parameters, action_selection=action_selection, seed=seed, parallel=parallel
        )


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
    recorded = extra.get("environment")
    return TrainedAgent(
        label=extra["label"],
        seed=extra["seed"],
        task=extra["task"],
        action_repeat=extra["action_repeat"],
        data_returns=np.array(extra["data_returns"], np.float64),
        model_config=from_mapping(kind, metadata.model_config, path="model"),
        parameters=parameters,
        step=metadata.step,
        settings=extra.get("agent", {}),
        environment=None if recorded is None else from_mapping(RecordedEnvironment, recorded, path="environment"),
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
            known = (agent.model_config, agent.step, agent.settings)
            if known != (twin.model_config, twin.step, twin.settings):
                raise ValueError(
                    f"two runs called {agent.label} differ in more than the seed (model, training steps or settings); "
                    "evaluate them apart, or train them under labels of their own"
                )
        seen[agent.label].append(agent)
    for other in agents[1:]:
        if other.environment != first.environment:
            raise ValueError(f"{other.label} and {first.label} act in different environments; evaluate them apart")
        for name in ("task", "action_repeat"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"{other.label} has {name}={getattr(other, name)}, {first.label} has {getattr(first, name)}; "
                    "evaluate agents of one task and one data set together"
                )
        if not np.array_equal(other.data_returns, first.data_returns):
            raise ValueError(f"{other.label} and {first.label} were trained on different data; evaluate them apart")


def shuffled_counterparts(agents: Sequence[TrainedAgent]) -> dict[str, str]:
    """agent -> the agent that was trained on shuffled chains and otherwise like it, by their labels."""
    orders = {agent.label: _without_order(agent.settings) for agent in agents}
    return {
        label: other
        for label, (order, settings) in orders.items()
        for other, (other_order, other_settings) in orders.items()
        if (order, other_order) == ("ascending", "shuffled") and settings == other_settings
    }


def _without_order(settings: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    chain = dict(settings.get("chain", {}))
    return chain.pop("order", None), {**settings, "chain": chain}


def check_context(agents: Sequence[TrainedAgent], protocol: ProtocolConfig) -> None:
    """Raises ValueError unless every agent's context holds the protocol's episodes, or may begin anew."""
    episodes = protocol.episodes
    for agent in agents if protocol.full_context == "refuse" else ():
        trajectories = getattr(agent.model_config, "trajectories", 1)
        if 1 < trajectories < episodes:
            raise ValueError(
                f"{episodes} episodes do not fit into one context of {trajectories}, which {agent.label} has; lower "
                "protocol.episodes, train with a larger chain.trajectories, or set protocol.full_context=begin_anew"
            )


def target_return(best_return: float, fraction: float) -> float:
    """The return to ask for.

    Raises:
        ValueError: A part of a best return that is not positive would be a higher goal, not a lower one.
    """
    if best_return <= 0 and fraction != 1:
        raise ValueError(
            f"the data's best return is {best_return:g}, of which {fraction:g} is no sensible target; "
            "use protocol.target_fraction=1.0 and no others"
        )
    return fraction * best_return


def evaluate(
    policy: Policy,
    environments: Any,
    protocol: ProtocolConfig,
    *,
    best_return: float,
    target_fraction: float | None = None,
    carry_context: bool = True,
    on_episode: Callable[[int], None] | None = None,
) -> Rollouts:
    """Rolls a policy out under the protocol, on the same resets whatever the policy, its target and its context.

    Args:
        policy: Acts.
        environments: A vector environment with the protocol's rows.
        protocol: How many episodes, of which resets.
        best_return: The data's.
        target_fraction: The part of it to ask for; None: the protocol's own, whose scores count.
        carry_context: As in `roll_out`.
        on_episode: As in `roll_out`.
    """
    fraction = protocol.target_fraction if target_fraction is None else target_fraction
    return roll_out(
        policy,
        environments,
        seeds=reset_seeds(rows=protocol.rows, episodes=protocol.episodes, seed=protocol.seed),
        target_return=target_return(best_return, fraction),
        carry_context=carry_context,
        begin_anew=protocol.full_context == "begin_anew",
        on_episode=on_episode,
    )
