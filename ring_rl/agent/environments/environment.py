"""The tasks of ExoRL as Gymnasium environments, with its observations.

A thin wrapper of its own: Gymnasium sorts the keys of dictionary observations, so flattening a wrapped walker
would give (height, orientations, velocity) where ExoRL's files hold dm_control's order (orientations, height,
velocity).

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ring_rl.agent.environments.domains import DOMAINS, parse_task, task_names
from ring_rl.typing import Float32, Float64

try:
    import gymnasium
    import mujoco

    from ring_rl.agent.environments.simulations import load_simulation
except ImportError as error:
    raise ImportError(
        f"environments need the simulator ({error}); install it with: pip install 'ring_rl[simulator]'"
    ) from error

__all__ = [
    "DMControlEnvironment",
    "make_environment",
    "make_vector_environment",
    "observations_of_states",
    "register_environments",
    "rewards_of_states",
]


class DMControlEnvironment(gymnasium.Env[Float32[np.ndarray, " O"], Float32[np.ndarray, " A"]]):
    """One task with flat float32 observations and actions in [-1, 1].

    A decision lasts `action_repeat` control steps; their rewards are summed. Actions are scaled to the
    actuators' range; what lies outside [-1, 1] is clipped, as the actuators would. The time limit truncates;
    only a discount of 0 terminates. `info` holds "physics", the state (qpos, qvel, activations) in
    float64, and after a step "discount", the product over the control steps.

    `reset(seed=...)` determines everything that follows until the next seeded reset.

    Attributes:
        task: "cartpole_swingup" and the like.
        action_repeat: Control steps a decision.
        episode_steps: Decisions until the time limit.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, Gymnasium declares it so

    def __init__(self, task: str, *, action_repeat: int) -> None:
        domain, _ = parse_task(task)
        control_steps = DOMAINS[domain].episode_steps
        if isinstance(action_repeat, bool) or not isinstance(action_repeat, int) or action_repeat < 1:
            raise ValueError(f"action_repeat must be an integer of at least 1, got {action_repeat!r}")
        if control_steps % action_repeat:
            raise ValueError(
                f"{task} has {control_steps} control steps, not divisible by action_repeat {action_repeat}; "
                "choose a divisor, such as 1, 2 or 4"
            )
        self.task = task
        self.action_repeat = action_repeat
        self.episode_steps = control_steps // action_repeat
        self._simulation = load_simulation(task, flat_observation=True)
        self._action_low, self._action_high = action_range(self._simulation.physics.model.ptr)
        spec = DOMAINS[domain]
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (spec.observation_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)
        self._running = False

    @property
    def simulation(self) -> Any:
        """The `dm_control.rl.control.Environment` inside. Stepping it by hand desynchronises this wrapper."""
        return self._simulation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, " O"], dict[str, Any]]:
        """Starts an episode. Without a seed it is drawn from the stream that the last seed started."""
        super().reset(seed=None if seed is None else int(seed), options=options)
        # A task has a RandomState of its own; a word from our stream starts it anew every episode.
        self._simulation.task.random.seed(int(self.np_random.integers(2**32)))
        time_step = self._simulation.reset()
        self._running = True
        return time_step.observation["observations"].astype(np.float32), {"physics": self._physics_state()}

    def step(
        self, action: Float32[np.ndarray, " A"]
    ) -> tuple[Float32[np.ndarray, " O"], float, bool, bool, dict[str, Any]]:
        """Takes one decision.

        Raises:
            ValueError: an action of the wrong shape or with a NaN.
            RuntimeError: the episode is over or was never started.
        """
        if not self._running:
            raise RuntimeError("the episode is over or not started; call reset() before step()")
        control = self._to_control(action)
        reward, discount = 0.0, 1.0
        observation = np.empty(self.observation_space.shape or (), np.float32)
        for _ in range(self.action_repeat):
            time_step = self._simulation.step(control)
            observation = time_step.observation["observations"].astype(np.float32)
            reward += float(time_step.reward)
            discount *= float(time_step.discount)
            if time_step.last():
                self._running = False
                break
        terminated = discount == 0.0
        truncated = not self._running and not terminated
        return (
            observation,
            reward,
            terminated,
            truncated,
            {"physics": self._physics_state(), "discount": discount},
        )

    def _to_control(self, action: Float32[np.ndarray, " A"]) -> Float64[np.ndarray, " A"]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(f"an action of {self.task} has shape {self.action_space.shape}, got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"an action must be finite, got {action}; check the policy for NaN")
        return control_of_actions(action, self._action_low, self._action_high)

    def _physics_state(self) -> Float64[np.ndarray, " P"]:
        return self._simulation.physics.get_state()


def make_environment(task: str, *, action_repeat: int) -> DMControlEnvironment:
    """Builds one environment; `task` is "cartpole_swingup" and the like.

    Raises:
        ValueError: unknown task (lists the known), or an `action_repeat` that does not divide the episode.
    """
    return DMControlEnvironment(task, action_repeat=action_repeat)


def make_vector_environment(
    task: str, *, count: int, action_repeat: int, batched: bool = True, threads: int | None = None
) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """Builds `count` environments that step together, for `reset(seed=[...])` with a seed each.

    Nothing resets by itself: all episodes of a task end at the same step.

    Args:
        task: "cartpole_swingup" and the like.
        count: Rows.
        action_repeat: Control steps a decision.
        batched: One simulator call steps all rows (`BatchedEnvironment`): the same episodes, many times as fast. False
            takes dm_control's own loop for each row in turn.
        threads: Of the batched simulator; None takes one a processor core. Changes nothing but speed.

    Raises:
        ValueError: `count` below 1, or what `make_environment` raises.
    """
    if count < 1:
        raise ValueError(f"count of environments must be at least 1, got {count}")
    if batched:
        from ring_rl.agent.environments.batched_environment import BatchedEnvironment  # it builds on this module

        threads = min(count, os.cpu_count() or 1) if threads is None else threads
        return BatchedEnvironment(task, count=count, action_repeat=action_repeat, threads=threads)
    return gymnasium.vector.SyncVectorEnv(
        [lambda: make_environment(task, action_repeat=action_repeat)] * count,
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
    )


def register_environments() -> None:
    """Registers every task as "ring_rl/<task>-v0" for `gymnasium.make`; calling it again changes nothing."""
    for task in task_names():
        name = f"ring_rl/{task}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(name, f"{__name__}:make_environment", kwargs={"task": task, "action_repeat": 1})


def rewards_of_states(
    task: str, physics_LP: Float64[np.ndarray, "L P"], actions_LA: Float32[np.ndarray, "L A"]
) -> Float64[np.ndarray, " L"]:
    """Recomputes rewards from recorded states, with the task's own reward function.

    Args:
        task: Whose reward; not necessarily the task of the recording.
        physics_LP: States REACHED, `trajectory.physics[1:]`.
        actions_LA: Actions that led there, `trajectory.actions`. They matter: cartpole's reward counts the
            control, and a relabelling that leaves it at 0 pays up to 25% too much.

    Cost: about 0.2 ms a state; `batched_physics` does the same for many episodes at once.
    """
    simulation, low, high = _load(task)
    physics = simulation.physics
    controls = control_of_actions(np.asarray(actions_LA, np.float64), low, high)
    rewards = np.empty(len(physics_LP))
    for row, (state, control) in enumerate(zip(physics_LP, controls, strict=True)):
        _set_state(physics, state, control)
        rewards[row] = simulation.task.get_reward(physics)
    return rewards


def observations_of_states(task: str, physics_LP: Float64[np.ndarray, "L P"]) -> Float32[np.ndarray, "L O"]:
    """Recomputes observations from recorded states, with the task's own function.

    Raises:
        ValueError: quadruped and jaco, which observe accelerations, forces or torques. They belong to the step
            that led to a state, not to the state.
    """
    domain, _ = parse_task(task)
    if domain in ("quadruped", "jaco"):
        raise ValueError(f"{domain} observes accelerations and forces, which its states do not hold; record them")
    simulation, low, _ = _load(task)
    rows = []
    for state in physics_LP:
        _set_state(simulation.physics, state, np.zeros_like(low))
        observation = simulation.task.get_observation(simulation.physics)
        rows.append(np.concatenate([np.ravel(each) for each in observation.values()]))
    return np.array(rows, dtype=np.float32)


def action_range(model: Any) -> tuple[Float64[np.ndarray, " A"], Float64[np.ndarray, " A"]]:
    """The lowest and highest control of every actuator of a `mujoco.MjModel`."""
    low, high = model.actuator_ctrlrange.T.copy()
    return low, high


def control_of_actions(
    actions: Float64[np.ndarray, "*rows A"], low: Float64[np.ndarray, " A"], high: Float64[np.ndarray, " A"]
) -> Float64[np.ndarray, "*rows A"]:
    """Scales actions from [-1, 1], clipped, to [low, high]."""
    return low + (high - low) * (np.clip(actions, -1.0, 1.0) + 1.0) / 2.0


def _load(task: str) -> tuple[Any, Float64[np.ndarray, " A"], Float64[np.ndarray, " A"]]:
    simulation = load_simulation(task, flat_observation=False)
    return simulation, *action_range(simulation.physics.model.ptr)


def _set_state(physics: Any, state: Float64[np.ndarray, " P"], control: Float64[np.ndarray, " A"]) -> None:
    """Brings what depends on position, velocity and control up to date, as dm_control's step does."""
    physics.set_state(state)
    physics.set_control(control)
    mujoco.mj_step1(physics.model.ptr, physics.data.ptr)  # pyright: ignore[reportAttributeAccessIssue]
