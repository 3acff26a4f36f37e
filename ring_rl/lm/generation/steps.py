"""The compiled half of generation: reading tokens into a cache that the devices of a ring share."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.kernels.decode import DEFAULT_SLOT_BLOCK
from ring_rl.lm.generation.sampling import Sampling, draw, row_keys
from ring_rl.lm.generation.table import DRAWN
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.nn.kv_cache import KVCache
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Array, PRNGKeyArray, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationSteps:
    """What a model of one configuration computes while it writes; its parameters are arguments.

    Attributes:
        prepare: parameters as trained -> parameters as `read` takes them, on every device.
        slots: tokens -> the cache slots to make room for them, rounded so that few sizes are compiled.
        begin: (rows, slots) -> an empty cache of so many slots on all devices together.
        read: (parameters, cache, tokens [B T], drawn [B], key, rows [B], counts [B]) -> (next token [B], its
            log-probability [B], cache), drawn with `row_keys(key, rows, counts)`. Where `tokens` says `DRAWN`, `drawn`
            is read. The cache is donated.
    """

    prepare: Callable[[PyTree], PyTree]
    slots: Callable[[int], int]
    begin: Callable[[int, int], KVCache]
    read: Callable[..., tuple[Array, Array, KVCache]]


@functools.lru_cache(maxsize=16)
def compiled_steps(
    config: LanguageModelConfig, sampling: Sampling, parallel: SequenceParallel | None
) -> GenerationSteps:
    """The jitted steps of a model; models that differ in parameters only share them.

    With `parallel` the devices of its sequence axis share the slots of the cache. Each has all the weights and reads
    all rows; what travels is one output a layer and new token.
    """
    trained = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    writing = nnx.eval_shape(lambda: _unstacked(LanguageModel(config, rngs=nnx.Rngs(0))))
    trained_graphdef, graphdef = nnx.split(trained)[0], nnx.split(writing)[0]
    devices = 1 if parallel is None else parallel.sequence_devices
    axis_name = None if parallel is None or devices == 1 else parallel.sequence_axis

    def on_mesh(step: Callable, inputs: tuple, outputs) -> Callable:
        if parallel is None or axis_name is None:
            return step
        return jax.shard_map(step, mesh=parallel.mesh, in_specs=inputs, out_specs=outputs)

    def begin(rows: int, slots: int) -> KVCache:
        like = jax.eval_shape(lambda: trained.begin(batch=rows, capacity=1))
        return like.emptied(capacity=slots // devices, axis_name=axis_name, slot_block=DEFAULT_SLOT_BLOCK)

    def read(
        parameters: PyTree,
        cache: KVCache,
        tokens_BT: Array,
        drawn_B: Array,
        key: PRNGKeyArray,
        rows_B: Array,
        counts_B: Array,
    ) -> tuple[Array, Array, KVCache]:
        tokens_BT = jnp.where(tokens_BT == DRAWN, drawn_B[:, None], tokens_BT)
        logits_BV, cache = nnx.merge(graphdef, parameters).decode(tokens_BT, cache)
        token_B, log_probability_B = draw(logits_BV, sampling, row_keys(key, rows_B, counts_B))
        return token_B, log_probability_B, cache

    memory = KVCache(layers=P(None, None, axis_name), length=P())  # pyright: ignore[reportArgumentType]
    everywhere = None if parallel is None or axis_name is None else NamedSharding(parallel.mesh, P())
    prepare = jax.jit(
        lambda parameters: nnx.split(_unstacked(nnx.merge(trained_graphdef, parameters)))[1], out_shardings=everywhere
    )
    return GenerationSteps(
        prepare=lambda parameters: prepare(
            parameters if everywhere is None else jax.device_put(parameters, everywhere)
        ),
        slots=functools.partial(rounded_slots, unit=devices * DEFAULT_SLOT_BLOCK),
        begin=jax.jit(lambda rows, slots: on_mesh(lambda: begin(rows, slots), (), memory)(), static_argnums=(0, 1)),
        read=jax.jit(on_mesh(read, (P(), memory, P(), P(), P(), P(), P()), (P(), P(), memory)), donate_argnums=1),
    )


def rounded_slots(tokens: int, *, unit: int) -> int:
    """The smallest number of slots, in quarters of an octave and whole units, that holds `tokens`.

    At most a quarter (or a unit) is in vain, and texts of any length up to 2^20 tokens need few programs.
    """
    quarter = max(1 << max(tokens.bit_length() - 3, 0), 1)
    slots = -(-tokens // quarter) * quarter
    return -(-slots // unit) * unit


def _unstacked(model: LanguageModel) -> LanguageModel:
    model.transformer.unstack()
    return model
