"""What acts in an environment: a trained model with its memory, or chance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.model import AgenticTransformer, AgentModel, Memory, ModelConfig, SequenceModelConfig, make_model
from ring_rl.agent.tokens import tokens_per_step
from ring_rl.kernels.cache_slots import DEFAULT_SLOT_BLOCK
from ring_rl.nn.kv_cache import KVCache
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Array, Float32, PRNGKeyArray, PyTree, Shaped

ActionSelection = Literal["mode", "sample"]
Chance = tuple[PRNGKeyArray, Array] | None

FIRST_SLOTS = 1024
"""Cache slots that a memory begins with. Fewer would save little: a step reads the model's weights as well."""


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
        decision_slots: Cache slots that one decision fills; 0 without a cache.
        context_slots: Cache slots of a whole context, on all devices together.
        first_slots: Those that a memory begins with.
        prepare: parameters as trained -> parameters as the steps below take them.
        begin: (parameters, rows) -> an empty memory.
        grow: (memory, slots) -> the same memory with room for more.
        act: (parameters, memory, now, chance) -> (actions, memory).
        observe_and_act: (parameters, memory, past, now, chance) -> (actions, memory).

    `chance` is None for the modes of the model's distributions, or (key, decision) for draws: row i draws from
    fold_in(fold_in(key, decision), i), whatever other rows there are.
    """

    context_trajectories: int
    decision_slots: int
    context_slots: int
    first_slots: int
    prepare: Callable[..., Any]
    begin: Callable[..., Any]
    grow: Callable[..., Any]
    act: Callable[..., Any]
    observe_and_act: Callable[..., Any]


@functools.lru_cache(maxsize=32)
def compiled_steps(config: ModelConfig, parallel: SequenceParallel | None) -> CompiledSteps:
    """The jitted steps of a model; agents that differ in parameters only, such as training seeds, share them.

    With `parallel` the devices of its sequence axis share the slots of the cache. Each has all the weights and acts in
    all rows; what travels is one output a layer and new token.
    """
    trained = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    acting = nnx.eval_shape(lambda: _unstacked(make_model(config, nnx.Rngs(0))))
    trained_graphdef, graphdef = nnx.split(trained)[0], nnx.split(acting)[0]
    whole_memory = jax.eval_shape(lambda: trained.begin(batch=1))
    slots = whole_memory.capacity if isinstance(whole_memory, KVCache) else 0
    devices = parallel.sequence_devices if parallel is not None and slots else 1
    axis_name = parallel.sequence_axis if parallel is not None and devices > 1 else None
    # A context of few slots is dealt out in small blocks, so that every device holds a part of it.
    slot_block = min(DEFAULT_SLOT_BLOCK, -(-slots // devices)) or 1
    whole_blocks = lambda count: -(-count // (devices * slot_block)) * devices * slot_block  # noqa: E731

    def prepare(parameters: PyTree) -> PyTree:
        return nnx.split(_unstacked(nnx.merge(trained_graphdef, parameters)))[1]

    def begin(parameters: PyTree, rows: int) -> Memory:
        if not slots:
            return nnx.merge(graphdef, parameters).begin(batch=rows)
        like: Any = jax.eval_shape(lambda: trained.begin(batch=rows))
        return like.emptied(capacity=first_slots // devices, axis_name=axis_name, slot_block=slot_block)

    def grow(memory: Memory, slots: int) -> Memory:
        return memory.resized(slots // devices)

    def act(parameters: PyTree, memory: Memory, now: ChainBatch, chance: Chance) -> tuple[Array, Memory]:
        model: Any = nnx.merge(graphdef, parameters)
        return model.act(memory, now, _row_keys(chance, len(now.steps)))

    def observe_and_act(
        parameters: PyTree, memory: Memory, past: ChainBatch, now: ChainBatch, chance: Chance
    ) -> tuple[Array, Memory]:
        model: Any = nnx.merge(graphdef, parameters)
        return model.observe_and_act(memory, past, now, _row_keys(chance, len(now.steps)))

    def on_mesh(step: Callable[..., Any], inputs: str, outputs: str) -> Callable[..., Any]:
        """`step` on every device; "m" is a memory, whose slots are shared, "=" what all have alike."""
        if parallel is None or axis_name is None:
            return step
        specs = {"=": P(), "m": KVCache(layers=P(None, None, axis_name), length=P())}  # pyright: ignore[reportArgumentType]
        given, returned = [specs[each] for each in inputs], [specs[each] for each in outputs]
        return jax.shard_map(
            step,
            mesh=parallel.mesh,
            in_specs=tuple(given),
            out_specs=returned[0] if len(returned) == 1 else tuple(returned),
        )

    whole = slots if axis_name is None else whole_blocks(slots)
    first_slots = min(FIRST_SLOTS if axis_name is None else whole_blocks(FIRST_SLOTS), whole)
    everywhere = None if parallel is None or axis_name is None else NamedSharding(parallel.mesh, P())
    compiled_prepare = jax.jit(prepare, out_shardings=everywhere)
    return CompiledSteps(
        context_trajectories=trained.context_trajectories,
        decision_slots=tokens_per_step(config.token_layout) if isinstance(config, SequenceModelConfig) else 0,
        context_slots=whole,
        first_slots=first_slots,
        prepare=lambda parameters: compiled_prepare(
            parameters if everywhere is None else jax.device_put(parameters, everywhere)
        ),
        begin=jax.jit(
            lambda parameters, rows: on_mesh(lambda parameters: begin(parameters, rows), "=", "m")(parameters),
            static_argnums=1,
        ),
        grow=jax.jit(
            lambda memory, slots: on_mesh(lambda memory: grow(memory, slots), "m", "m")(memory), static_argnums=1
        ),
        # The memory is donated: a step writes a few slots in place instead of copying the whole cache.
        act=jax.jit(on_mesh(act, "=m==", "=m"), donate_argnums=1),
        observe_and_act=jax.jit(on_mesh(observe_and_act, "=m===", "=m"), donate_argnums=1),
    )


def _unstacked(model: AgentModel) -> AgentModel:
    if isinstance(model, AgenticTransformer):
        model.transformer.unstack()
    return model


def _row_keys(chance: Chance, rows: int) -> Shaped[PRNGKeyArray, " rows"] | None:
    if chance is None:
        return None
    key, decision = chance
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, decision), np.arange(rows))


class ModelPolicy:
    """A trained model acting through its memory.

    What followed an action enters the memory together with the next step, so that an environment step costs
    one call of the device, not two. The memory starts small and doubles when it is full: a step reads all of it, and
    an early episode should not pay for the room of a late one.

    Args:
        config: What the model was built from.
        parameters: Its arrays.
        action_selection: Whether to take the "mode" of what the model says about an action, or to "sample" from it.
            A model that knows one action only, such as one trained with squared error, does the same in both.
        seed: Of the draws. A row's draws depend on the seed, its index and how many decisions this policy has
            made, through all episodes; not on how many other rows there are.
        parallel: A mesh whose sequence axis shares the memory's slots, for contexts that one device cannot hold; None:
            one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: PyTree,
        *,
        action_selection: ActionSelection = "mode",
        seed: int = 0,
        parallel: SequenceParallel | None = None,
    ):
        if action_selection not in get_args(ActionSelection):
            raise ValueError(f"action_selection must be mode or sample, got {action_selection!r}")
        self._trained_parameters, self._parameters = parameters, None
        self._key = jax.random.key(seed) if action_selection == "sample" else None
        self._decisions = 0
        self._steps = compiled_steps(config, parallel)
        self._memory: Memory = None
        self._slots, self._filled = 0, 0
        self._pending: ChainBatch | None = None

    @property
    def context_trajectories(self) -> int:
        """Episodes after which the memory is full."""
        return self._steps.context_trajectories

    def begin(self, rows: int) -> None:
        """Forgets everything."""
        if self._parameters is None:
            self._parameters = self._steps.prepare(self._trained_parameters)
        self._memory = None  # frees the last one before the next is made
        self._memory, self._pending = self._steps.begin(self._parameters, rows), None
        self._slots, self._filled = self._steps.first_slots, 0

    def act(self, now: ChainBatch) -> Float32[np.ndarray, "rows A"]:
        """Actions for one step."""
        chance = None if self._key is None else (self._key, np.uint32(self._decisions))
        self._decisions += 1
        self._make_room()
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

    def _make_room(self) -> None:
        """Doubles the memory if one more decision would not fit."""
        self._filled += self._steps.decision_slots
        if self._slots < self._filled <= self._steps.context_slots:
            self._slots = min(2 * self._slots, self._steps.context_slots)
            self._memory = self._steps.grow(self._memory, self._slots)


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
