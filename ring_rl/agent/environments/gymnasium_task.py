"""Any Gymnasium environment with vectors in and out, as agents see it: the task "gymnasium/<id>".

Made from what a data set recorded of its environment (`RecordedEnvironment`). Needs Gymnasium and whatever the
environment itself needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ring_rl.agent.environments.recorded import RecordedEnvironment
from ring_rl.typing import Bool, Float32, Float64

try:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec
except ImportError as error:
    raise ImportError(f"Gymnasium environments need gymnasium ({error}): pip install 'ring_rl[simulator]'") from error

__all__ = ["FlatEnvironment", "IndependentRows", "make_recorded_environment", "make_recorded_rows"]


class FlatEnvironment(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """One environment with flat float32 observations and actions in [-1, 1].

    `info` holds "discount" after a step, 0 where the episode terminated; and "physics" where the environment gives
    its state under that name.

    Raises:
        ValueError: Its actions have another size than recorded.
    """

    def __init__(self, env: gymnasium.Env, recorded: RecordedEnvironment) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, recorded=recorded)
        gymnasium.Wrapper.__init__(self, env)
        self.recorded = recorded
        actions = env.action_space
        if not isinstance(actions, gymnasium.spaces.Box) or actions.low.size != recorded.action_dim:
            raise ValueError(
                f"{recorded.environment_id} takes actions {actions}, the data hold {recorded.action_dim} numbers an "
                "action; evaluate in the environment that the data were recorded in"
            )
        self._actions = actions
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (recorded.observation_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (recorded.action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, " O"], dict[str, Any]]:
        """Starts an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self.recorded.flatten(observation), _state(info)

    def step(
        self, action: Float32[np.ndarray, " A"]
    ) -> tuple[Float32[np.ndarray, " O"], float, bool, bool, dict[str, Any]]:
        """Takes one step."""
        space = self._actions
        scaled = self.recorded.action_range.from_unit(action).astype(space.dtype).reshape(space.shape)
        # A bound that float32 rounds outward would leave the environment's space.
        observation, reward, terminated, truncated, info = self.env.step(np.clip(scaled, space.low, space.high))
        discount = float(info.get("discount", not terminated))
        flat = self.recorded.flatten(observation)
        return flat, float(reward), bool(terminated), bool(truncated), {"discount": discount, **_state(info)}


class IndependentRows(gymnasium.vector.VectorEnv):
    """Environments that step together and whose episodes end apart.

    Nothing resets by itself. A row that has ended stands still when it is stepped, with reward 0, until a reset:
    of all rows, or of those in `reset(options={"reset_mask": mask})`.
    """

    def __init__(self, environments: Sequence[FlatEnvironment]) -> None:
        self.environments = tuple(environments)
        self.num_envs = len(self.environments)
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
        first = self.environments[0]
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.observation_space = gymnasium.vector.utils.batch_space(first.observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(first.action_space, self.num_envs)
        self._observations = np.zeros(self.observation_space.shape or (), np.float32)
        self._ended = np.ones(self.num_envs, bool)
        self._info: list[dict[str, Any]] = [{} for _ in self.environments]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, "rows O"], dict[str, Any]]:
        """Starts episodes: in every row, or in those of `options["reset_mask"]`; `seed` has an entry for every row."""
        rows: Bool[np.ndarray, " rows"] = np.ones(self.num_envs, bool)
        if options is not None and "reset_mask" in options:
            rows = np.asarray(options["reset_mask"], bool)
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + row for row in range(self.num_envs)]
        else:
            seeds = list(seed)
        for row in np.flatnonzero(rows):
            self._observations[row], self._info[row] = self.environments[row].reset(seed=seeds[row])
            self._ended[row] = False
        return self._observations.copy(), self._stacked_state()

    def step(
        self, actions: Float32[np.ndarray, "rows A"]
    ) -> tuple[
        Float32[np.ndarray, "rows O"],
        Float64[np.ndarray, " rows"],
        Bool[np.ndarray, " rows"],
        Bool[np.ndarray, " rows"],
        dict[str, Any],
    ]:
        """Takes one step in every row whose episode goes on."""
        rewards, discounts = np.zeros(self.num_envs), np.ones(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for row in np.flatnonzero(~self._ended):
            observation, rewards[row], terminated[row], truncated[row], info = self.environments[row].step(actions[row])
            self._observations[row], self._info[row], discounts[row] = observation, info, info["discount"]
        self._ended |= terminated | truncated
        return (
            self._observations.copy(),
            rewards,
            terminated,
            truncated,
            {"discount": discounts, **self._stacked_state()},
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Closes every environment."""
        del kwargs
        for environment in self.environments:
            environment.close()

    def _stacked_state(self) -> dict[str, np.ndarray]:
        if "physics" not in self._info[0]:
            return {}
        return {"physics": np.stack([info["physics"] for info in self._info])}


def make_recorded_environment(recorded: RecordedEnvironment) -> FlatEnvironment:
    """Builds the environment of a data set.

    The recorded specification may name any Python module; it is imported, as `gymnasium.make` does. Use data sets
    that you trust.

    Raises:
        ValueError: Gymnasium does not know it, or it does not fit the data.
        ImportError: What it needs is not installed.
    """
    limit = recorded.max_episode_steps
    try:
        spec = recorded.environment_id if recorded.spec is None else EnvSpec.from_json(recorded.spec)
        environment = gymnasium.make(spec, max_episode_steps=limit)
    except (gymnasium.error.Error, ImportError) as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(
            f"cannot make {recorded.environment_id} ({' '.join(str(error).split())}); install the package that "
            "registers it, with what it needs"
        ) from error
    flat = FlatEnvironment(environment, recorded)
    flat.reset(seed=0)  # an observation that does not fit is known before any work
    return flat


def make_recorded_rows(recorded: RecordedEnvironment, *, count: int) -> IndependentRows:
    """Builds `count` copies of a data set's environment whose episodes may end apart.

    Raises:
        ValueError: `count` below 1, or what `make_recorded_environment` raises.
    """
    if count < 1:
        raise ValueError(f"count of environments must be at least 1, got {count}")
    return IndependentRows([make_recorded_environment(recorded) for _ in range(count)])


def _state(info: dict[str, Any]) -> dict[str, Any]:
    return {"physics": info["physics"]} if isinstance(info.get("physics"), np.ndarray) else {}
