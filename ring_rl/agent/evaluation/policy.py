"""What acts in an environment: a trained model with its memory, or chance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.model import Memory, ModelConfig, make_model
from ring_rl.typing import Array, Float32, PyTree


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
        act: (parameters, memory, now) -> (actions, memory).
        observe_and_act: (parameters, memory, past, now) -> (actions, memory).
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

    def act(parameters: PyTree, memory: Memory, now: ChainBatch) -> tuple[Array, Memory]:
        model: Any = nnx.merge(graphdef, parameters)
        return model.act(memory, now)

    def observe_and_act(parameters: PyTree, memory: Memory, past: ChainBatch, now: ChainBatch) -> tuple[Array, Memory]:
        model: Any = nnx.merge(graphdef, parameters)
        return model.observe_and_act(memory, past, now)

    return CompiledSteps(
        context_trajectories=abstract.context_trajectories,
        begin=jax.jit(begin, static_argnums=1),
        # The memory is donated: a step writes a few slots in place instead of copying the whole cache.
        act=jax.jit(act, donate_argnums=1),
        observe_and_act=jax.jit(observe_and_act, donate_argnums=1),
    )


class ModelPolicy:
    """A trained model acting through its memory, greedily and without randomness.

    What followed an action enters the memory together with the next step, so that an environment step costs
    one call of the device, not two.
    """

    def __init__(self, config: ModelConfig, parameters: PyTree):
        self._parameters = parameters
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
        if self._pending is None:
            actions, self._memory = self._steps.act(self._parameters, self._memory, now)
        else:
            actions, self._memory = self._steps.observe_and_act(self._parameters, self._memory, self._pending, now)
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
