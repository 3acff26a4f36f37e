"""What acts in an environment: a trained model with its memory, or chance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import jax
import numpy as np
from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.model import Memory, ModelConfig, make_model
from ring_rl.typing import Array, Float32, PRNGKeyArray, PyTree, Shaped

ActionSelection = Literal["mode", "sample"]
Chance = tuple[PRNGKeyArray, Array] | None


class Policy(Protocol):
    """Acts in several environments at once, one row each."""

    @property
    def context_trajectories(self) -> int:
        """Episodes after which the memory is full and must be emptied."""
        ...

    def begin(self, rows: int) -> None:
        """Forgets everything."""
        ...

    def act(self, now: ChainBatch) -> Float32[np.ndarray, "rows A"]:
        """Actions for one step [rows, 1, ...]; of `now` only what is known before acting is read."""
        ...

    def observe(self, now: ChainBatch) -> None:
        """Takes in the same step with its actions, rewards and completions."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledSteps:
    """What a model of one configuration computes; its parameters are arguments.

    Attributes:
        context_trajectories: Episodes that a memory holds.
        begin: (parameters, rows) -> an empty memory.
        act: (parameters, memory, now, chance) -> (actions, memory).
        observe_and_act: (parameters, memory, past, now, chance) -> (actions, memory).

    `chance` is None for the modes of the model's distributions, or (key, decision) for draws: row i draws from
    fold_in(fold_in(key, decision), i), whatever other rows there are.
    """

    context_trajectories: int
    begin: Callable[..., Any]
    act: Callable[..., Any]
    observe_and_act: Callable[..., Any]


@functools.lru_cache(maxsize=32)
def compiled_steps(config: ModelConfig) -> CompiledSteps:
    """The jitted steps of a model; agents that differ in parameters only, such as training seeds, share them."""
    abstract = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    graphdef = nnx.split(abstract)[0]

    def begin(parameters: PyTree, rows: int) -> Memory:
        return nnx.merge(graphdef, parameters).begin(batch=rows)

    def act(parameters: PyTree, memory: Memory, now: ChainBatch, chance: Chance) -> tuple[Array, Memory]:
        model: Any = nnx.merge(graphdef, parameters)
        return model.act(memory, now, _row_keys(chance, len(now.steps)))

    def observe_and_act(
        parameters: PyTree, memory: Memory, past: ChainBatch, now: ChainBatch, chance: Chance
    ) -> tuple[Array, Memory]:
        model: Any = nnx.merge(graphdef, parameters)
        return model.observe_and_act(memory, past, now, _row_keys(chance, len(now.steps)))

    return CompiledSteps(
        context_trajectories=abstract.context_trajectories,
        begin=jax.jit(begin, static_argnums=1),
        # The memory is donated: a step writes a few slots in place instead of copying the whole cache.
        act=jax.jit(act, donate_argnums=1),
        observe_and_act=jax.jit(observe_and_act, donate_argnums=1),
    )


def _row_keys(chance: Chance, rows: int) -> Shaped[PRNGKeyArray, " rows"] | None:
    if chance is None:
        return None
    key, decision = chance
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, decision), np.arange(rows))


class ModelPolicy:
    """A trained model acting through its memory.

    What followed an action enters the memory together with the next step, so that an environment step costs
    one call of the device, not two.

    Args:
        config: What the model was built from.
        parameters: Its arrays.
        action_selection: Whether to take the "mode" of what the model says about an action, or to "sample" from it.
            A model that knows one action only, such as one trained with squared error, does the same in both.
        seed: Of the draws. A row's draws depend on the seed, its index and how many decisions this policy has
            made, through all episodes; not on how many other rows there are.
    """

    def __init__(
        self, config: ModelConfig, parameters: PyTree, *, action_selection: ActionSelection = "mode", seed: int = 0
    ):
        if action_selection not in get_args(ActionSelection):
            raise ValueError(f"action_selection must be mode or sample, got {action_selection!r}")
        self._parameters = parameters
        self._key = jax.random.key(seed) if action_selection == "sample" else None
        self._decisions = 0
        self._steps = compiled_steps(config)
        self._memory: Memory = None
        self._pending: ChainBatch | None = None

    @property
    def context_trajectories(self) -> int:
        """Episodes after which the memory is full."""
        return self._steps.context_trajectories

    def begin(self, rows: int) -> None:
        """Forgets everything."""
        self._memory, self._pending = self._steps.begin(self._parameters, rows), None

    def act(self, now: ChainBatch) -> Float32[np.ndarray, "rows A"]:
        """Actions for one step."""
        chance = None if self._key is None else (self._key, np.uint32(self._decisions))
        self._decisions += 1
        if self._pending is None:
            actions, self._memory = self._steps.act(self._parameters, self._memory, now, chance)
        else:
            actions, self._memory = self._steps.observe_and_act(
                self._parameters, self._memory, self._pending, now, chance
            )
            self._pending = None
        return np.asarray(actions)

    def observe(self, now: ChainBatch) -> None:
        """Keeps the outcome for the next call of `act`."""
        self._pending = now


class UniformPolicy:
    """Actions drawn uniformly from [-1, 1], from a stream of each row's own."""

    context_trajectories = 1

    def __init__(self, *, action_dim: int, seed: int):
        self._action_dim, self._seed = action_dim, seed
        self._generators: list[np.random.Generator] = []

    def begin(self, rows: int) -> None:
        """Starts the streams, on the first call; later episodes go on with them."""
        if not self._generators:
            self._generators = [np.random.default_rng([self._seed, row]) for row in range(rows)]

    def act(self, now: ChainBatch) -> Float32[np.ndarray, "rows A"]:
        """Actions that look at nothing."""
        del now
        draws = [generator.uniform(-1.0, 1.0, self._action_dim) for generator in self._generators]
        return np.array(draws, np.float32)

    def observe(self, now: ChainBatch) -> None:
        """Learns nothing."""
