"""What one device holds while a language model's training step runs, asked of the compiler; nothing is run."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ring_rl.kernels.layout import Layout
from ring_rl.kernels.local.block import LocalBlock, LocalName
from ring_rl.kernels.local.pallas_tpu import PallasTpuBlock
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.lm.loss import make_language_loss
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.nn.parallel import SequenceParallel, SequenceStrategy
from ring_rl.training.dry_run import needed_bytes, sharded_bytes
from ring_rl.training.mesh import MeshConfig, batch_sharding, make_mesh, with_shardings
from ring_rl.training.optimizer import OptimizerConfig, make_optimizer
from ring_rl.training.state import abstract_state
from ring_rl.training.step import make_train_step

__all__ = ["AttentionBlock", "CompiledMemory", "StepRequest", "compile_memory", "lower_step", "parse_refusal"]

AttentionBlock = Literal["auto", "pallas_tpu", "xla"]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRequest:
    """A training step: forward, backward and optimizer, over `batch_size` sequences of `context` tokens.

    Attributes:
        model: The language model; its transformer also says in what memory it computes.
        mesh: Devices along each axis.
        layout: Which tokens a device of a ring holds.
        strategy: How shards of a sequence meet.
        ulysses_size: With strategy="hybrid", see `SequenceParallel`; 1 otherwise.
        weights_over_ring: Whether the devices that share a sequence share weights and moments, too.
        context: Tokens of a sequence.
        batch_size: Sequences of a step, over all devices.
        loss_chunks: Steps in which a device sees its tokens' logits.
        optimizer: Its rule and numbers, of which only the rule matters here.
        attention_block: What computes a device's share of attention: "pallas_tpu", our own kernels, for TPUs only;
            "xla"; "auto" is pallas_tpu on TPUs and xla on CPU devices, which stand for others.
        heads_at_once: Key-value heads that are worked on at a time; None leaves it to that block.
    """

    model: LanguageModelConfig
    mesh: MeshConfig
    layout: Layout
    strategy: SequenceStrategy
    ulysses_size: int
    weights_over_ring: bool
    context: int
    batch_size: int
    loss_chunks: int
    optimizer: OptimizerConfig
    attention_block: AttentionBlock
    heads_at_once: int | None

    def __post_init__(self) -> None:
        for name in ("context", "batch_size", "loss_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledMemory:
    """What the compiler says of a step, in bytes of one device.

    Attributes:
        peak_bytes: Most that is held at once, arguments included (`ring_rl.training.dry_run.needed_bytes`); None where
            the compiler refused the step for want of memory.
        wanted_bytes: Where it refused: what it says it wanted, arguments perhaps not included; None if it did not say.
        limit_bytes: Where it refused: what it says there is.
        state_bytes: Parameters and optimizer state.
        attention_block: What computes a device's share of attention; "auto" is xla, on CPU devices.
        lower_seconds: Tracing and lowering.
        compile_seconds: The compiler, on this machine as busy as it was.
    """

    peak_bytes: int | None
    wanted_bytes: int | None
    limit_bytes: int | None
    state_bytes: int
    attention_block: AttentionBlock
    lower_seconds: float
    compile_seconds: float

    def fits(self, memory_bytes: int) -> bool:
        """Whether a device of `memory_bytes` holds the step."""
        return self.peak_bytes is not None and self.peak_bytes <= memory_bytes


def compile_memory(request: StepRequest, devices: Sequence[Any]) -> CompiledMemory:
    """Compiles the step for these devices, which need not be there, and reads what one of them would hold.

    On TPUs the peak is the compiler's own. On CPU devices it is arguments, new outputs and temporaries as XLA's CPU
    compiler lays them out: an estimate for anything else.

    Raises:
        ValueError: The mesh, the model and the context do not fit together, or the compiler reports no memory.
        jax.errors.JaxRuntimeError: The compiler failed for another reason than memory.
    """
    began = time.perf_counter()
    lowered, state_bytes = lower_step(request, devices)
    lower_seconds = time.perf_counter() - began
    peak, wanted, limit = None, None, None
    began = time.perf_counter()
    try:
        peak = needed_bytes(lowered.compile(), platform=devices[0].platform)
    except jax.errors.JaxRuntimeError as error:
        refusal = parse_refusal(str(error))
        if refusal is None:
            raise
        wanted, limit = refusal
    return CompiledMemory(
        peak_bytes=peak,
        wanted_bytes=wanted,
        limit_bytes=limit,
        state_bytes=state_bytes,
        attention_block=_block_name(request, devices[0].platform),
        lower_seconds=lower_seconds,
        compile_seconds=time.perf_counter() - began,
    )


def lower_step(request: StepRequest, devices: Sequence[Any]) -> tuple[jax.stages.Lowered, int]:
    """The step, traced for these devices, and the bytes of parameters and optimizer state on each.

    Raises:
        ValueError: The mesh, the model and the context do not fit together.
    """
    mesh = make_mesh(request.mesh, devices=devices)
    parallel = SequenceParallel(
        mesh=mesh,
        layout=request.layout,
        strategy=request.strategy,
        ulysses_size=request.ulysses_size,
        weight_axes=("fsdp", "sp") if request.weights_over_ring else ("fsdp",),
        local_block=_block(request, devices[0].platform),
        heads_at_once=request.heads_at_once,
    )
    request.model.transformer.check(parallel, batch=request.batch_size, length=request.context)
    optimizer = make_optimizer(request.optimizer, total_steps=request.optimizer.warmup_steps + 1)
    graphdef, state = abstract_state(
        lambda rngs: LanguageModel(request.model, rngs=rngs),
        optimizer,
        mesh=mesh,
        weight_axes=parallel.weight_axes,
    )
    batch = _abstract_batch(request.batch_size, request.context)
    loss = make_language_loss(parallel, chunks=request.loss_chunks, z_loss=0.0)
    step = make_train_step(loss, graphdef, optimizer, mesh, seed=0)
    return step.lower(state, with_shardings(batch, batch_sharding(mesh, batch))), sharded_bytes(state)


def parse_refusal(message: str) -> tuple[int | None, int | None] | None:
    """(bytes wanted, bytes there are) of a compiler that wants more memory than a device has.

    None for any other complaint, such as a kernel that wants more of a core's fast memory than it has.
    """
    if "RESOURCE_EXHAUSTED" not in message or not re.search(r"\bhbm\b", message, re.IGNORECASE):
        return None
    sizes = re.search(r"\(([\d.]+)([KMGTP]?)\) exceeds available HBM \(([\d.]+)([KMGTP]?)\)", message)
    sizes = sizes or re.search(r"Used ([\d.]+)([KMGTP]?) of ([\d.]+)([KMGTP]?) hbm", message)
    if sizes is None:
        return None, None
    wanted, wanted_unit, limit, limit_unit = sizes.groups()
    return int(float(wanted) * _UNITS[wanted_unit]), int(float(limit) * _UNITS[limit_unit])


def _block_name(request: StepRequest, platform: str) -> AttentionBlock:
    if request.attention_block == "auto" and platform == "tpu":
        return "pallas_tpu"
    return request.attention_block


def _block(request: StepRequest, platform: str) -> LocalName | LocalBlock:
    """The block, told that its platform is not the one it is compiled on."""
    name, size = _block_name(request, platform), request.model.transformer.attention_block_size
    if platform != "tpu":
        if name == "pallas_tpu":
            raise ValueError("attention_block=pallas_tpu compiles for TPUs only; use auto or xla for CPU devices")
        # CPU devices stand for GPUs here; what a CPU's own block keeps in its caches says nothing about those.
        return "xla"
    return XlaBlock(block_size=size) if name == "xla" else PallasTpuBlock(block_size=size, cross_compile=True)


def _abstract_batch(rows: int, tokens: int) -> TokenBatch:
    def shaped(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, tokens), dtype)

    return TokenBatch(
        tokens=shaped(jnp.int32),
        targets=shaped(jnp.int32),
        weights=shaped(jnp.float32),
        positions=shaped(jnp.int32),
        segment_ids=None,
        answer_ids=None,
    )
