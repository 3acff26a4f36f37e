"""Many episodes at once, stepped by `mujoco.batch`: threads in C where dm_control loops in Python.

The states of dm_control's own loop, bit for bit, over whole episodes with contacts too, because every row carries the
last solution of its contact solver along (its warm start) as dm_control's one simulation does. Observations and
rewards of these states are computed for whole arrays and agree to rounding.

The simulator's sensors lag: what a physics step reports of positions and velocities belongs to the state it
started from. So they are read in the step after, and those of the last state are computed for it alone; sensors
of accelerations and forces are read in the step that led to a state, as dm_control has them::

    physics step     |--- 1 ---|--- 2 ---|--- 3 ---|- positions and velocities only -|
    state          s[0]      s[1]      s[2]      s[3]
    position and velocity sensors       of s[1]   of s[2]   of s[3]
    acceleration sensors      s[1]      s[2]      s[3]

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

# pyright: reportAttributeAccessIssue=false
# MuJoCo's names come from a compiled module without type information.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ring_rl.agent.environments.batched_tasks import make_batched_task
from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.environments.environment import (
    DMControlEnvironment,
    action_range,
    control_of_actions,
    make_environment,
)
from ring_rl.agent.environments.simulator_clock import without_clock
from ring_rl.typing import Float32, Float64

import mujoco  # isort: skip

try:
    from mujoco.batch import Batch  # isort: skip
except ImportError as error:
    raise ImportError(
        f"batched physics needs mujoco 3.17 or later (found {mujoco.__version__}: {error}); install it with: "
        "pip install --upgrade 'mujoco>=3.17,<4'"
    ) from error

__all__ = ["BatchedPhysics", "BatchedStart", "BatchedSteps"]

_SIMULATED_RESETS = ("cheetah",)
"""Domains whose episodes begin with physics steps, which threads can share; resets of the others are Python."""

_CHUNK_VALUES = 2**20
"""Numbers the simulator records at a time, 8 MiB: whole episodes of many rows would be gigabytes."""


@dataclass(frozen=True, eq=False)
class BatchedStart:
    """Where B episodes begin.

    Attributes:
        observations: Of the initial states.
        physics: (qpos, qvel, activations).
        warm_starts: The contact solver's last solution, joint accelerations.
    """

    observations: Float32[np.ndarray, "B O"]
    physics: Float64[np.ndarray, "B P"]
    warm_starts: Float64[np.ndarray, "B nv"]


@dataclass(frozen=True, eq=False)
class BatchedSteps:
    """What followed a batch of actions: k control steps of B episodes.

    Attributes:
        observations: Of the states reached.
        rewards: Paid on reaching them.
        physics: (qpos, qvel, activations) of the states reached.
        warm_starts: The contact solver's last solution at the last of them.
    """

    observations: Float32[np.ndarray, "B k O"]
    rewards: Float64[np.ndarray, "B k"]
    physics: Float64[np.ndarray, "B k P"]
    warm_starts: Float64[np.ndarray, "B nv"]


class BatchedPhysics:
    """One task, any number of episodes; a pure function of states, actions and warm starts.

    With the warm starts of `start` and of the steps before handed on, the states are those of dm_control's own loop.
    Without them the contact solver starts cold: a single step then agrees to 1e-6, and bodies in contact may drift
    apart over an episode.

    Attributes:
        task: "cartpole_swingup" and the like.
        episode_steps: Control steps until the time limit. Counting them is left to the caller.
    """

    def __init__(self, task: str, *, threads: int) -> None:
        """Args: task: its name; threads: that step episodes side by side; the result does not depend on them.

        Raises:
            ValueError: unknown task, or fewer than one thread.
        """
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.task = task
        self._domain = parse_task(task)[0]
        self.episode_steps = DOMAINS[self._domain].episode_steps
        self._threads = threads
        self._environment = make_environment(task, action_repeat=1)
        self._environments = [self._environment]
        simulation = self._environment.simulation
        self._task = make_batched_task(task)
        self._substeps = round(simulation.control_timestep() / simulation.physics.timestep())
        model = self._model = self._task.model
        self._low, self._high = action_range(model)
        # Acceleration sensors hold what the step before computed, all others what the step after computes.
        self._sensor_lags = np.repeat(model.sensor_needstage != mujoco.mjtStage.mjSTAGE_ACC, model.sensor_dim)
        self._physics_dim = model.nq + model.nv + model.na
        self._batch: Any = None
        self._closed = False

    def __enter__(self) -> BatchedPhysics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        self._batch, self._closed = None, True

    def start(self, seeds: Sequence[int | np.random.Generator]) -> BatchedStart:
        """Where episodes begin, as of `make_environment(task).reset(seed=seed)` for each seed.

        In place of a seed may stand a generator that earlier resets have drawn from, as without a seed.
        """
        rows = list(seeds)
        with without_clock():
            if self._threads == 1 or len(rows) < self._threads or self._domain not in _SIMULATED_RESETS:
                return _joined([self._starts_of(self._environment, rows)])
            missing = self._threads - len(self._environments)
            self._environments += [make_environment(self.task, action_repeat=1) for _ in range(missing)]
            shares = [rows[thread :: self._threads] for thread in range(self._threads)]
            with ThreadPoolExecutor(self._threads) as pool:
                parts = list(pool.map(self._starts_of, self._environments, shares))
        joined = _joined(parts)
        order = np.argsort(
            np.concatenate([np.arange(thread, len(rows), self._threads) for thread in range(self._threads)])
        )
        return BatchedStart(joined.observations[order], joined.physics[order], joined.warm_starts[order])

    @staticmethod
    def _starts_of(environment: DMControlEnvironment, seeds: Sequence[int | np.random.Generator]) -> BatchedStart:
        starts, warm_starts = [], []
        for seed in seeds:
            if isinstance(seed, np.random.Generator):
                environment.np_random = seed
                starts.append(environment.reset())
            else:
                starts.append(environment.reset(seed=seed))
            warm_starts.append(environment.simulation.physics.data.ptr.qacc_warmstart.copy())
        observations, infos = zip(*starts, strict=True)
        return BatchedStart(
            np.stack(observations), np.stack([info["physics"] for info in infos]), np.stack(warm_starts)
        )

    def reset(self, seeds: Sequence[int]) -> tuple[Float32[np.ndarray, "B O"], Float64[np.ndarray, "B P"]]:
        """Initial observations and states: `start` for callers that do without warm starts."""
        start = self.start(seeds)
        return start.observations, start.physics

    def step(
        self,
        physics_BP: Float64[np.ndarray, "B P"],
        actions_BA: Float32[np.ndarray, "B A"],
        *,
        action_hold: int,
        warm_starts: Float64[np.ndarray, "B nv"] | None = None,
    ) -> BatchedSteps:
        """Holds every action for `action_hold` control steps; `play` of one decision.

        Args:
            physics_BP: Where each episode stands; the last row of the previous `BatchedSteps.physics`.
            actions_BA: In [-1, 1]; what lies outside is clipped.
            action_hold: k, at least 1.
            warm_starts: Those of the previous `BatchedSteps` or `BatchedStart`; None starts the solver cold.

        Raises:
            ValueError: shapes that do not fit, or a value that is not finite.
            FloatingPointError: a simulation became unstable. The simulator would silently start it anew.
        """
        self._check("actions", actions_BA, len(physics_BP), len(self._low))
        return self.play(physics_BP, actions_BA[:, None], action_hold=action_hold, warm_starts=warm_starts)

    def play(
        self,
        physics_BP: Float64[np.ndarray, "B P"],
        actions_BLA: Float32[np.ndarray, "B L A"],
        *,
        action_hold: int,
        warm_starts: Float64[np.ndarray, "B nv"] | None = None,
    ) -> BatchedSteps:
        """Plays L decisions that are known beforehand, each held for `action_hold` control steps: k = L action_hold.

        The fastest way through an episode, for actions that do not depend on observations. Arguments and errors as of
        `step`. Memory beyond the result: some 10 MiB, whatever L is.
        """
        decisions = actions_BLA.shape[1] if actions_BLA.ndim == 3 else 1
        self._check("physics", physics_BP, len(physics_BP), self._physics_dim)
        self._check("actions", actions_BLA, len(physics_BP), max(decisions, 1), len(self._low))
        if action_hold < 1:
            raise ValueError(f"action_hold must be at least 1, got {action_hold}")
        controls_BLA = control_of_actions(actions_BLA.astype(np.float64), self._low, self._high)
        batch, ids = self._load(physics_BP, warm_starts)
        parts = [
            self._task_values(*part) for part in self._advance(batch, ids, controls_BLA.repeat(action_hold, axis=1))
        ]
        observations, rewards, physics = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
        return BatchedSteps(observations, rewards, physics, batch.qacc_warmstart[: len(physics_BP)].copy())

    def rewards(
        self, physics_BP: Float64[np.ndarray, "B P"], actions_BA: Float32[np.ndarray, "B A"]
    ) -> Float64[np.ndarray, " B"]:
        """Recomputes rewards of recorded states under the actions that led there; see `rewards_of_states`."""
        self._check("physics", physics_BP, len(physics_BP), self._physics_dim)
        self._check("actions", actions_BA, len(physics_BP), len(self._low))
        controls_BA = control_of_actions(actions_BA.astype(np.float64), self._low, self._high)
        batch, ids = self._load(physics_BP, None)
        return self._task.reward(physics_BP, self._sensors_now(batch, ids), controls_BA)

    def _load(
        self, physics_BP: Float64[np.ndarray, "B P"], warm_starts: Float64[np.ndarray, "B nv"] | None
    ) -> tuple[Any, np.ndarray]:
        """The simulator with these states in its first rows, and the numbers of those rows."""
        if self._closed:
            raise RuntimeError("this BatchedPhysics is closed")
        rows, nq, nv = len(physics_BP), self._model.nq, self._model.nv
        if warm_starts is not None:
            self._check("warm_starts", warm_starts, rows, nv)
        if self._batch is None or self._batch.nsim < rows:
            self._batch = Batch(self._model, rows, self._threads)
        batch = self._batch
        batch.qpos[:rows] = physics_BP[:, :nq]
        batch.qvel[:rows] = physics_BP[:, nq : nq + nv]
        batch.act[:rows] = physics_BP[:, nq + nv :]
        batch.qacc_warmstart[:rows] = 0.0 if warm_starts is None else warm_starts
        batch.warning[:rows] = 0
        return batch, np.arange(rows)

    def _advance(
        self, batch: Any, ids: np.ndarray, controls: Float64[np.ndarray, "B k A"]
    ) -> Iterator[tuple[Float64[np.ndarray, "B c P"], Float64[np.ndarray, "B c sensor"], Float64[np.ndarray, "B c A"]]]:
        """States reached, their sensors and the controls that led there, some control steps at a time."""
        rows, count, _ = controls.shape
        width = self._substeps * (1 + self._physics_dim + self._model.nsensordata + self._model.nu)
        chunk = max(1, _CHUNK_VALUES // (rows * width))
        full_state = mujoco.mjtState.mjSTATE_FULLPHYSICS  # (time, qpos, qvel, activations)
        for first in range(0, count, chunk):
            held = controls[:, first : first + chunk]
            steps = held.shape[1] * self._substeps
            with without_clock():
                record = batch.rollout(
                    steps, held.repeat(self._substeps, axis=1), record=(full_state, "sensordata"), ids=ids
                )
            self._refuse_unstable(batch, rows)
            reached = record[full_state][:, self._substeps - 1 :: self._substeps, 1:]
            sensors = record["sensordata"][:, self._substeps - 1 :: self._substeps]
            if self._sensor_lags.any():
                after = record["sensordata"][:, self._substeps :: self._substeps]
                after = np.concatenate([after, self._sensors_now(batch, ids)[:, None]], axis=1)
                sensors = np.where(self._sensor_lags, after, sensors)
            yield reached, sensors, held

    def _sensors_now(self, batch: Any, ids: np.ndarray) -> Float64[np.ndarray, "B sensor"]:
        """Sensors of the states the simulator holds; those of accelerations are meaningless."""
        sensors = batch.sensordata
        batch.forward(ids, stage=mujoco.mjtStage.mjSTAGE_VEL)
        return sensors[: len(ids)]

    def _task_values(
        self,
        states: Float64[np.ndarray, "B c P"],
        sensors: Float64[np.ndarray, "B c sensor"],
        controls: Float64[np.ndarray, "B c A"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        observations = self._task.observe(states, sensors).astype(np.float32)
        return observations, self._task.reward(states, sensors, controls), states

    def _refuse_unstable(self, batch: Any, rows: int) -> None:
        # The simulator warns of what is not finite or huge, and starts that simulation anew.
        unstable = batch.warning[:rows, :, 1].any(axis=1)
        if unstable.any():
            raise FloatingPointError(
                f"the simulation of {self.task} became unstable in episode {int(np.argmax(unstable))} of the "
                "batch; use smaller actions or another seed"
            )

    def _check(self, name: str, array: np.ndarray, *shape: int) -> None:
        if array.shape != shape:
            raise ValueError(f"{name} of {self.task} must have shape {shape}, got {array.shape}")
        if not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
            raise ValueError(f"{name} must be finite, got a NaN or infinity in row {row}")


def _joined(parts: Sequence[BatchedStart]) -> BatchedStart:
    names = ("observations", "physics", "warm_starts")
    return BatchedStart(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
