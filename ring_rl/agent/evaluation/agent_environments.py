"""The environment that a trained agent is evaluated in: one of ours, or the one that its data set recorded."""

from collections.abc import Sequence
from typing import Any

from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.evaluation.protocol import TrainedAgent

__all__ = ["check_episode_length", "make_agent_environments"]


def make_agent_environments(agent: TrainedAgent, *, count: int, action_repeat: int) -> Any:
    """A Gymnasium vector environment with `count` rows that does not reset by itself.

    Rows of our tasks end together. Those of a recorded environment may end apart; it takes one decision a step, and
    cuts episodes where the agent's data say (`RecordedEnvironment.max_episode_steps`).

    Raises:
        ImportError: The simulator, or what the environment needs, is not installed.
        ValueError: The environment does not fit the agent.
    """
    if agent.environment is None:
        from ring_rl.agent.environments.environment import make_vector_environment

        return make_vector_environment(agent.task, count=count, action_repeat=action_repeat)
    from ring_rl.agent.environments.gymnasium_task import make_recorded_rows

    return make_recorded_rows(agent.environment, count=count)


def check_episode_length(agents: Sequence[TrainedAgent]) -> None:
    """Raises ValueError if an agent's context was made for shorter or longer episodes than its task has.

    A recorded environment may end whenever it likes before its limit, so there the context must hold the limit.
    """
    for agent in agents:
        trained = getattr(agent.model_config, "episode_steps", None)
        if trained is None:
            continue
        if agent.environment is not None:
            limit, fits = agent.environment.max_episode_steps, trained >= agent.environment.max_episode_steps
        else:
            limit = DOMAINS[parse_task(agent.task)[0]].episode_steps
            fits = trained * agent.action_repeat == limit
        if not fits:
            raise ValueError(
                f"{agent.label} was trained on episodes of {trained * agent.action_repeat} control steps, "
                f"{agent.task} has {limit}; train on whole episodes of the task"
            )
