"""The compiled half of generation: reading tokens into a cache that the devices of a ring share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.kernels.decode import DEFAULT_SLOT_BLOCK
from ring_rl.lm.generation.prompts import Chunk
from ring_rl.lm.generation.sampling import Sampling, draw, row_keys
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.nn.kv_cache import KVCache
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Array, Float32, Int32, PRNGKeyArray, PyTree


class Drawn(NamedTuple):
    """A token for each row, and its log-probability."""

    tokens: Int32[Array, " B"]
    log_probabilities: Float32[Array, " B"]


class CacheSize(NamedTuple):
    """Room in a cache.

    Attributes:
        slots: Of a row, on all devices together.
        slot_block: Positions dealt to a device at a time, as in `ring_rl.kernels.decode`.
    """

    slots: int
    slot_block: int


def cache_size(tokens: int, *, devices: int) -> CacheSize:
    """Room for `tokens` tokens a row, in few sizes so that few programs are compiled.

    Slots come in quarters of an octave, and in whole blocks on all devices: at most a quarter of them, and a block on
    each device, are in vain. A context of few tokens is dealt out in small blocks, so that every device holds a part.
    """
    quarter = 1 << max(tokens.bit_length() - 3, 0)
    slots = -(-max(tokens, DEFAULT_SLOT_BLOCK) // quarter) * quarter
    share = max(slots // devices, 1)
    slot_block = min(DEFAULT_SLOT_BLOCK, 1 << (share.bit_length() - 1))
    return CacheSize(-(-slots // (devices * slot_block)) * devices * slot_block, slot_block)


@functools.lru_cache(maxsize=16)
def compiled_prepare(config: LanguageModelConfig, parallel: SequenceParallel | None) -> Callable[[PyTree], PyTree]:
    """parameters as trained -> parameters as `GenerationSteps` take them: each layer's own, whole on every device."""
    graphdef = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))[0]
    everywhere = None if parallel is None or parallel.sequence_devices == 1 else NamedSharding(parallel.mesh, P())
    prepare = jax.jit(
        lambda parameters: nnx.split(_unstacked(nnx.merge(graphdef, parameters)))[1], out_shardings=everywhere
    )
    return lambda parameters: prepare(parameters if everywhere is None else jax.device_put(parameters, everywhere))


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationSteps:
    """What a model of one configuration computes while it writes; its parameters are arguments.

    Attributes:
        begin: (rows, slots) -> (an empty cache of so many slots on all devices together, nothing drawn yet).
        read: (parameters, cache, chunk, drawn, key) -> (drawn, cache). Reads a `Chunk` of prompts and draws each row's
            first token; a row that has none in this chunk keeps what it had drawn.
        write: (parameters, cache, drawn, key, number) -> (drawn, cache). Reads what was drawn and draws each row's
            new token of that number.

    Caches are donated. Row i draws its token `number` with `row_keys(key, ...)[i]`.
    """

    begin: Callable[[int, int], tuple[KVCache, Drawn]]
    read: Callable[..., tuple[Drawn, KVCache]]
    write: Callable[..., tuple[Drawn, KVCache]]


@functools.lru_cache(maxsize=64)
def compiled_steps(
    config: LanguageModelConfig, sampling: Sampling, parallel: SequenceParallel | None, *, slot_block: int
) -> GenerationSteps:
    """The jitted steps of a model; models that differ in parameters only share them.

    With `parallel` the devices of its sequence axis share the slots of the cache. Each has all the weights and reads
    all rows; what travels is one output a layer and new token.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: _unstacked(LanguageModel(config, rngs=nnx.Rngs(0)))))[0]
    devices = 1 if parallel is None else parallel.sequence_devices
    axis_name = None if parallel is None or devices == 1 else parallel.sequence_axis

    def on_mesh(step: Callable, inputs: tuple, outputs: object) -> Callable:
        if parallel is None or axis_name is None:
            return step
        return jax.shard_map(step, mesh=parallel.mesh, in_specs=inputs, out_specs=outputs)

    def empty(rows: int, slots: int) -> KVCache:
        like = jax.eval_shape(
            lambda: LanguageModel(config, rngs=nnx.Rngs(0)).begin(batch=rows, capacity=1).with_row_lengths()
        )
        return like.emptied(capacity=slots, axis_name=axis_name, slot_block=slot_block)

    specs = jax.eval_shape(lambda: empty(1, 1)).specs(axis_name)

    def drawn_next(
        parameters: PyTree, cache: KVCache, tokens_BT: Array, counts_B: Array | None, key: PRNGKeyArray, number: Array
    ) -> tuple[Drawn, KVCache]:
        model = nnx.merge(graphdef, parameters)
        logits_BV, cache = model.decode(tokens_BT, cache, counts=counts_B)
        return Drawn(*draw(logits_BV, sampling, row_keys(key, logits_BV.shape[0], number))), cache

    def read(
        parameters: PyTree, cache: KVCache, chunk: Chunk, drawn: Drawn, key: PRNGKeyArray
    ) -> tuple[Drawn, KVCache]:
        tokens_BT, counts_B = jnp.asarray(chunk.tokens), jnp.asarray(chunk.counts)
        fresh, cache = drawn_next(parameters, cache, tokens_BT, counts_B, key, jnp.uint32(0))
        return jax.tree.map(lambda new, old: jnp.where(counts_B > 0, new, old), fresh, drawn), cache

    def write(
        parameters: PyTree, cache: KVCache, drawn: Drawn, key: PRNGKeyArray, number: Array
    ) -> tuple[Drawn, KVCache]:
        return drawn_next(parameters, cache, drawn.tokens[:, None], None, key, number)

    def begin(rows: int, slots: int) -> tuple[KVCache, Drawn]:
        nothing = Drawn(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32))
        return on_mesh(lambda: (empty(rows, slots // devices), nothing), (), (specs, P()))()

    return GenerationSteps(
        begin=jax.jit(begin, static_argnums=(0, 1)),
        read=jax.jit(on_mesh(read, (P(), specs, P(), P(), P()), (P(), specs)), donate_argnums=1),
        write=jax.jit(on_mesh(write, (P(), specs, P(), P(), P()), (P(), specs)), donate_argnums=1),
    )


def _unstacked(model: LanguageModel) -> LanguageModel:
    model.transformer.unstack()
    return model
