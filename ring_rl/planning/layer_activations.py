"""Activations of one layer as a compiler lays them out, beside table 1 of Ring Attention, arXiv:2310.01889.

The paper's layer is compiled: as many key-value heads as query heads, a feed-forward of two matrices and 4 h hidden
units, no positions. Its two parts are programs of their own, as the table has them, because recomputation part by part
keeps them from living at once. Nothing is run.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ring_rl.kernels.cost_paper import Architecture
from ring_rl.kernels.feedforward import blockwise_feedforward
from ring_rl.kernels.local.block import LocalBlock, LocalName
from ring_rl.kernels.local.pallas_tpu import PallasTpuBlock
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.nn.block import Block, normalised
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.token_context import TokenContext
from ring_rl.nn.transformer_config import ComputeDtype, TransformerConfig
from ring_rl.nn.weights import gathered, weight_specs
from ring_rl.planning.compiled_step import AttentionBlock
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.typing import Array

Part = Literal["attention", "feed_forward"]
Direction = Literal["forward", "training"]
PARTS: tuple[Part, ...] = ("attention", "feed_forward")
DIRECTIONS: tuple[Direction, ...] = ("forward", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer on one device, which has one sequence, or its share of one.

    Attributes:
        tokens: On the device: s, of the ring c.
        width: h.
        heads: n.
        block_size: Largest edge of a tile of scores.
        feed_forward_chunks: Steps of a blockwise feed-forward.
        dtype: Of activations.
    """

    tokens: int
    width: int
    heads: int
    block_size: int
    feed_forward_chunks: int
    dtype: ComputeDtype

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.tokens % self.feed_forward_chunks:
            raise ValueError(f"feed_forward_chunks={self.feed_forward_chunks} must divide tokens={self.tokens}")

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return jnp.dtype(self.dtype).itemsize

    def transformer(self, *, blockwise: bool) -> TransformerConfig:
        """The paper's layer, its feed-forward at once or in steps."""
        return TransformerConfig(
            layers=1,
            width=self.width,
            query_heads=self.heads,
            key_value_heads=self.heads,
            head_dim=self.width // self.heads,
            norm_epsilon=1e-6,
            feed_forward="gelu",
            feed_forward_width=4 * self.width,
            feed_forward_chunks=self.feed_forward_chunks if blockwise else 1,
            rotary_base=10000.0,
            rotary_fraction=0.0,
            rotary_scaling=None,
            no_position_layers=(),
            retrieval=None,
            attention_window=None,
            attention_block_size=self.block_size,
            saved_activations="all",
            compute_dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProgram:
    """What is compiled. Rows of the table that are the same program compare equal.

    Attributes:
        part: Of the layer.
        direction: "training" is forward and backward in one.
        dense: Whether all scores of a sequence exist at once. Always False of a feed-forward.
        blockwise: Whether the feed-forward runs in steps. Always False of an attention.
        ring: Whether the devices share one sequence; otherwise each has its own. Always False of a feed-forward, which
            asks no other device for anything.
        tokens: On a device.
    """

    part: Part
    direction: Direction
    dense: bool
    blockwise: bool
    ring: bool
    tokens: int


def program_of(architecture: Architecture, *, part: Part, direction: Direction, tokens: int) -> LayerProgram:
    """The program behind a cell of the table."""
    attends = part == "attention"
    return LayerProgram(
        part=part,
        direction=direction,
        dense=attends and architecture == "vanilla",
        blockwise=not attends and architecture in ("blockwise_transformer", "ring"),
        ring=attends and architecture == "ring",
        tokens=tokens,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Bytes on one device.

    Attributes:
        activation_bytes: What the program allocates beyond its arguments (parameters, the layer's input, in training
            the gradient of its output) and its results (the output; in training gradients).
        compile_seconds: On this machine, as busy as it was.
    """

    activation_bytes: int
    compile_seconds: float


def compile_layer(
    program: LayerProgram,
    shape: LayerShape,
    devices: Sequence[Any],
    *,
    attention_block: AttentionBlock,
    heads_at_once: int | None,
) -> LayerMemory:
    """Compiles the program for all of these devices, which need not be there.

    Attention takes `heads_at_once` heads at a time, all or as many as the block wants if None.

    Of a TPU's program it is the compiler's peak less arguments and results, of any other the temporaries.

    Raises:
        ValueError: The shape does not fit the devices.
        jax.errors.JaxRuntimeError: The compiler failed, on TPUs also for want of memory.
    """
    count, platform = len(devices), devices[0].platform
    sp = count if program.ring else 1
    mesh = make_mesh(MeshConfig(dp=1, fsdp=count // sp, tp=1, sp=sp), devices=devices)
    parallel = SequenceParallel(
        mesh=mesh,
        layout="zigzag",
        strategy="dense" if program.dense else "ring",
        weight_axes=(),
        local_block=local_block(attention_block, platform=platform, block_size=shape.block_size),
        heads_at_once=heads_at_once,
    )
    config = shape.transformer(blockwise=program.blockwise)
    rows, tokens = count // sp, program.tokens * sp
    config.check(parallel, batch=rows, length=tokens)
    run, parameters = _layer(config, parallel, program.part)
    x = jax.ShapeDtypeStruct(
        (rows, tokens, shape.width), jnp.dtype(shape.dtype), sharding=NamedSharding(mesh, parallel.token_spec)
    )
    began = time.perf_counter()
    if program.direction == "forward":
        lowered = jax.jit(run).lower(parameters, x)
    else:
        lowered = jax.jit(lambda parameters, x, d_y: jax.vjp(run, parameters, x)[1](d_y)).lower(parameters, x, x)
    compiled = lowered.compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(f"the backend {platform} does not report the memory of a program; use cpu, gpu or tpu")
    beyond = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    size = analysis.peak_memory_in_bytes - beyond if platform == "tpu" else analysis.temp_size_in_bytes
    return LayerMemory(activation_bytes=int(size), compile_seconds=time.perf_counter() - began)


def local_block(name: AttentionBlock, *, platform: str, block_size: int) -> LocalName | LocalBlock:
    """The block that computes a device's share of attention, for a platform that need not be here."""
    if platform == "tpu" and name != "xla":
        return PallasTpuBlock(block_size=block_size, cross_compile=True)
    if name == "pallas_tpu":
        raise ValueError("attention_block=pallas_tpu compiles for TPUs only; use auto or xla for CPU devices")
    # CPU devices stand for GPUs here, and so do XLA's tiles.
    return XlaBlock(block_size=block_size) if platform == "tpu" else "xla"


def _layer(
    config: TransformerConfig, parallel: SequenceParallel, part: Part
) -> tuple[Callable[[Any, Array], Array], Any]:
    """The part as a function of parameters and activations, and its parameters' shapes, whole on every device."""
    local = parallel.local()
    definition, parameters = nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    specs = weight_specs(parameters, local)

    def run(parameters: nnx.State, x: Array) -> Array:
        block = nnx.merge(definition, gathered(parameters, specs, local, dtype=jnp.dtype(config.compute_dtype)))
        no_positions = jnp.zeros((1, 0), jnp.int32)
        nothing_known = TokenContext(positions=no_positions, segment_ids=None, rotation=None, together=None)
        if part == "attention":
            return x + block.attention(normalised(block.attention_norm, x), nothing_known, local)
        feed_forward = partial(block._feed_forward, parallel=local)
        return x + blockwise_feedforward(feed_forward, x, chunks=config.feed_forward_chunks)

    whole = NamedSharding(parallel.mesh, PartitionSpec())
    return (
        jax.shard_map(run, mesh=local.mesh, in_specs=(specs, local.token_spec), out_specs=local.token_spec),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), parameters),
    )
