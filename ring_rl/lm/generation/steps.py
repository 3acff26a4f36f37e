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

from ring_rl.lm.generation.cache import batch_devices
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


@functools.lru_cache(maxsize=16)
def compiled_prepare(config: LanguageModelConfig, parallel: SequenceParallel | None) -> Callable[[PyTree], PyTree]:
    """parameters as trained -> parameters as `GenerationSteps` take them: each layer's own, whole on every device."""
    graphdef = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))[0]
    everywhere = None if parallel is None or parallel.mesh.size == 1 else NamedSharding(parallel.mesh, P())
    prepare = jax.jit(
        lambda parameters: nnx.split(_unstacked(nnx.merge(graphdef, parameters)))[1], out_shardings=everywhere
    )
    return lambda parameters: prepare(parameters if everywhere is None else jax.device_put(parameters, everywhere))


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationSteps:
    """What a model of one configuration computes while it writes; its parameters are arguments.

    Attributes:
        begin: (rows, slots) -> (an empty cache of so many slots on all devices together, nothing drawn yet).
        read: (parameters, cache, chunk, drawn, rows, key) -> (drawn, cache). Reads a `Chunk` of prompts and draws each
            row's first token; a row that has none in this chunk keeps what it had drawn.
        write: (parameters, cache, drawn, rows, key, number) -> (drawn, cache). Reads what was drawn and draws each
            row's new token of that number.

    Caches are donated. `rows` are the rows' numbers, 0, 1, ...; each draws with its `row_keys(key, rows, number)`.
    """

    begin: Callable[[int, int], tuple[KVCache, Drawn]]
    read: Callable[..., tuple[Drawn, KVCache]]
    write: Callable[..., tuple[Drawn, KVCache]]


@functools.lru_cache(maxsize=64)
def compiled_steps(
    config: LanguageModelConfig, sampling: Sampling, parallel: SequenceParallel | None, *, slot_block: int
) -> GenerationSteps:
    """The jitted steps of a model; models that differ in parameters only share them.

    With `parallel` the devices of its sequence axis share the slots of the cache, and those of its batch axes the rows.
    Each has all the weights; what travels is one output a layer and new token.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: _unstacked(LanguageModel(config, rngs=nnx.Rngs(0)))))[0]
    devices = 1 if parallel is None else parallel.sequence_devices
    axis_name = None if parallel is None or devices == 1 else parallel.sequence_axis
    by_row = P() if parallel is None else P(parallel.token_spec[0])

    def on_mesh(step: Callable, inputs: tuple, outputs: object) -> Callable:
        if parallel is None or parallel.mesh.size == 1:
            return step
        return jax.shard_map(step, mesh=parallel.mesh, in_specs=inputs, out_specs=outputs)

    def empty(rows: int, slots: int) -> KVCache:
        like = jax.eval_shape(
            lambda: LanguageModel(config, rngs=nnx.Rngs(0)).begin(batch=rows, capacity=1).with_row_lengths()
        )
        return like.emptied(capacity=slots, axis_name=axis_name, slot_block=slot_block)

    cache_specs = jax.eval_shape(lambda: empty(1, 1)).specs(axis_name)
    cache_specs = jax.tree.map(lambda spec: P(*by_row, *spec[1:]), cache_specs)

    def read(
        parameters: PyTree, cache: KVCache, chunk: Chunk, drawn: Drawn, rows: Array, key: PRNGKeyArray
    ) -> tuple[Drawn, KVCache]:
        counts_B = jnp.asarray(chunk.counts)
        logits_BV, cache = nnx.merge(graphdef, parameters).decode(jnp.asarray(chunk.tokens), cache, counts=counts_B)
        fresh = Drawn(*draw(logits_BV, sampling, row_keys(key, rows, 0)))
        return jax.tree.map(lambda new, old: jnp.where(counts_B > 0, new, old), fresh, drawn), cache

    def write(
        parameters: PyTree, cache: KVCache, drawn: Drawn, rows: Array, key: PRNGKeyArray, number: Array
    ) -> tuple[Drawn, KVCache]:
        logits_BV, cache = nnx.merge(graphdef, parameters).decode(drawn.tokens[:, None], cache)
        return Drawn(*draw(logits_BV, sampling, row_keys(key, rows, number))), cache

    def begin(rows: int, slots: int) -> tuple[KVCache, Drawn]:
        rows //= batch_devices(parallel)
        nothing = Drawn(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32))
        return on_mesh(lambda: (empty(rows, slots // devices), nothing), (), (cache_specs, by_row))()

    def compiled(step: Callable, inputs: tuple) -> Callable[..., tuple[Drawn, KVCache]]:
        return jax.jit(on_mesh(step, inputs, (by_row, cache_specs)), donate_argnums=1)

    return GenerationSteps(
        begin=jax.jit(begin, static_argnums=(0, 1)),
        read=compiled(read, (P(), cache_specs, by_row, by_row, by_row, P())),
        write=compiled(write, (P(), cache_specs, by_row, by_row, P(), P())),
    )


def _unstacked(model: LanguageModel) -> LanguageModel:
    model.transformer.unstack()
    return model
