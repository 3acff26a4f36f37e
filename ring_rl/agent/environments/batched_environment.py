"""Environments that step together in one simulator call, as a Gymnasium vector environment.

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector.utils import batch_space

from ring_rl.agent.environments.batched_physics import BatchedPhysics, BatchedStart
from ring_rl.agent.environments.environment import make_environment
from ring_rl.typing import Bool, Float32, Float64

__all__ = ["BatchedEnvironment"]

Steps = tuple[
    Float32[np.ndarray, "B O"],
    Float64[np.ndarray, " B"],
    Bool[np.ndarray, " B"],
    Bool[np.ndarray, " B"],
    dict[str, Any],
]


class BatchedEnvironment(gymnasium.vector.VectorEnv[Float32[np.ndarray, "B O"], Float32[np.ndarray, "B A"], Any]):
    """`DMControlEnvironment` B times: the same episodes for the same seeds, many times as fast.

    States are those of B environments in turn, bit for bit; observations and rewards agree to rounding (see
    `BatchedPhysics`). All rows end at the same step, and nothing resets by itself.

    Attributes:
        task: "cartpole_swingup" and the like.
        action_repeat: Control steps a decision.
        episode_steps: Decisions until the time limit.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012, Gymnasium declares it so
        "render_modes": [],
        "autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED,
    }

    def __init__(self, task: str, *, count: int, action_repeat: int, threads: int) -> None:
        """Args: task: its name; count: rows B; action_repeat: a divisor of the episode; threads: of the simulator.

        Raises:
            ValueError: unknown task, numbers below 1, an `action_repeat` that does not divide the episode.
        """
        if count < 1:
            raise ValueError(f"count of environments must be at least 1, got {count}")
        single = make_environment(task, action_repeat=action_repeat)
        self.task, self.action_repeat, self.episode_steps = task, action_repeat, single.episode_steps
        self.num_envs = count
        self.single_observation_space, self.single_action_space = single.observation_space, single.action_space
        self.observation_space = batch_space(single.observation_space, count)
        self.action_space = batch_space(single.action_space, count)
        self._simulator = BatchedPhysics(task, threads=threads)
        self._streams: list[np.random.Generator | None] = [None] * count
        self._physics_BP = np.empty((count, 0))
        self._warm_starts: Float64[np.ndarray, "B nv"] | None = None
        self._decisions_left = 0

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, "B O"], dict[str, Any]]:
        """Starts an episode in every row; a seed s means s, s + 1, ..., and None goes on with a row's stream.

        Raises:
            ValueError: another number of seeds than rows; a mask that leaves rows out.
        """
        mask = (options or {}).get("reset_mask")
        if mask is not None and not np.all(mask):
            raise ValueError("all rows of a BatchedEnvironment start together; leave out reset_mask")
        if seed is None or isinstance(seed, int):
            seeds: list[int | None] = [None if seed is None else seed + row for row in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments; give one each")
        start = self._start(seeds)
        self._physics_BP, self._warm_starts = start.physics, start.warm_starts
        self._decisions_left = self.episode_steps
        return start.observations, self._info(physics=start.physics)

    def _start(self, seeds: Sequence[int | None]) -> BatchedStart:
        streams = []
        for seed, stream in zip(seeds, self._streams, strict=True):
            fresh = stream is None or seed is not None
            streams.append(seeding.np_random(None if seed is None else int(seed))[0] if fresh else stream)
        self._streams = streams
        return self._simulator.start(streams)

    def step(self, actions: Float32[np.ndarray, "B A"]) -> Steps:
        """Takes one decision in every row.

        Raises:
            ValueError: actions of the wrong shape or with a NaN.
            RuntimeError: the episodes are over or were never started.
            FloatingPointError: a simulation became unstable.
        """
        if self._decisions_left == 0:
            raise RuntimeError("the episodes are over or not started; call reset() before step()")
        steps = self._simulator.step(
            self._physics_BP, np.asarray(actions), action_hold=self.action_repeat, warm_starts=self._warm_starts
        )
        self._physics_BP, self._warm_starts = steps.physics[:, -1], steps.warm_starts
        self._decisions_left -= 1
        nothing = np.zeros(self.num_envs, bool)
        ended = np.full(self.num_envs, self._decisions_left == 0)
        info = self._info(physics=steps.physics[:, -1], discount=np.ones(self.num_envs))
        rewards = np.cumsum(steps.rewards, axis=1)[:, -1]  # one after the other, as a loop adds them up
        return steps.observations[:, -1], rewards, nothing, ended, info

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the simulator's threads."""
        del kwargs
        self._simulator.close()

    def _info(self, **values: np.ndarray) -> dict[str, Any]:
        """Every value beside a mask of the rows that have it, as Gymnasium's vector environments do."""
        masks = {f"_{name}": np.ones(self.num_envs, bool) for name in values}
        return {**values, **masks}
