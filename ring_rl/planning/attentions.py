"""The paper's four ways to train a transformer, and two more, as a training step on a machine.

Vanilla, memory-efficient and blockwise attention train one sequence a device, the weights shared by all (FSDP). Ring,
Ulysses and hybrid share one sequence, and the weights, among all devices. conf/context_limits.yaml defines them.
"""

from __future__ import annotations

import dataclasses
import math

from ring_rl.kernels.layout import Layout
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.nn.parallel import SequenceStrategy
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.nn.transformer_config import ComputeDtype, TransformerConfig
from ring_rl.planning.compiled_step import AttentionBlock, StepRequest
from ring_rl.training.mesh import MeshConfig
from ring_rl.training.optimizer import OptimizerConfig

__all__ = ["AttentionVariant", "StepSettings", "chunks_of", "divisible", "step_request"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionVariant:
    """A way to attend, and what goes with it.

    Attributes:
        label: What tables call it.
        strategy: "dense" forms all scores at once; "ring" on one device is blockwise attention.
        sequence_devices: How many devices share one sequence, and with it the weights; None is all that
            `tensor_devices` leave.
        tensor_devices: How many share the heads, the feed-forward's width and the vocabulary.
        ulysses_size: With strategy="hybrid", devices that swap tokens for heads; 1 otherwise.
        saved_activations: Of a layer, see `TransformerConfig`.
        feed_forward_blockwise: Whether the feed-forward sees a block of tokens at a time.
    """

    label: str
    strategy: SequenceStrategy
    sequence_devices: int | None
    tensor_devices: int
    ulysses_size: int
    saved_activations: SavedActivations
    feed_forward_blockwise: bool

    def __post_init__(self) -> None:
        for name, devices in (("sequence_devices", self.sequence_devices), ("tensor_devices", self.tensor_devices)):
            if devices is not None and devices < 1:
                raise ValueError(f"{name} of {self.label} must be at least 1, got {devices}")
        if not self.label:
            raise ValueError("a way to attend needs a label for tables, got ''")
        if self.ulysses_size < 1 or (self.ulysses_size > 1 and self.strategy != "hybrid"):
            raise ValueError(
                f"ulysses_size of {self.label} must be at least 1, and 1 unless strategy is hybrid; got "
                f"{self.ulysses_size} with strategy={self.strategy}"
            )
        if self.strategy == "dense" and self.sequence_devices != 1:
            raise ValueError(
                f"strategy=dense of {self.label} needs each sequence whole on a device: set sequence_devices to 1, "
                "or strategy to ring"
            )

    def mesh(self, devices: int) -> MeshConfig:
        """So many devices, groups of which share a sequence; of another number if they do not divide into groups."""
        sp = max(1, devices // self.tensor_devices) if self.sequence_devices is None else self.sequence_devices
        return MeshConfig(dp=1, fsdp=max(1, devices // (self.tensor_devices * sp)), tp=self.tensor_devices, sp=sp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What all ways to attend have in common.

    Attributes:
        layout: Of rings.
        vocabulary_size: Tokens of the vocabulary.
        tied_embedding: Whether the head is the transpose of the embedding.
        feed_forward_block: Tokens that a blockwise feed-forward sees at a time.
        loss_block: Tokens whose logits a device sees at a time.
        attention_block: What computes a device's share, see `StepRequest`.
        heads_at_once: Key-value heads that are worked on at a time, see `StepRequest`; vanilla attention takes all.
        tpu_dtype: Activations and matrix products on TPUs.
        gpu_dtype: The same on GPUs.
        optimizer: Its rule decides what state a parameter has.
    """

    layout: Layout
    vocabulary_size: int
    tied_embedding: bool
    feed_forward_block: int
    loss_block: int
    attention_block: AttentionBlock
    heads_at_once: int | None
    tpu_dtype: ComputeDtype
    gpu_dtype: ComputeDtype
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        for name in ("feed_forward_block", "loss_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 token, got {getattr(self, name)}")
        if self.heads_at_once is not None and self.heads_at_once < 1:
            raise ValueError(f"heads_at_once must be at least 1, or null for all heads, got {self.heads_at_once}")


def step_request(
    variant: AttentionVariant,
    transformer: TransformerConfig,
    settings: StepSettings,
    *,
    devices: int,
    estimated: bool,
    tokens_a_device: int,
) -> StepRequest:
    """The training step with so many tokens on each device.

    Args:
        variant: The way to attend.
        transformer: The model; widths that the devices don't divide are rounded up, see `divisible`.
        settings: Everything else.
        devices: Of the machine.
        estimated: Whether it is compiled for CPU devices that stand for GPUs.
        tokens_a_device: The context is so many times the devices that share a sequence.
    """
    mesh = variant.mesh(devices)
    blocks = chunks_of(tokens_a_device, settings.feed_forward_block)
    transformer = dataclasses.replace(
        divisible(transformer, mesh.fsdp * mesh.sp),
        saved_activations=variant.saved_activations,
        feed_forward_chunks=blocks if variant.feed_forward_blockwise else 1,
        compute_dtype=settings.gpu_dtype if estimated else settings.tpu_dtype,
    )
    return StepRequest(
        model=LanguageModelConfig(
            name="language",
            vocabulary_size=settings.vocabulary_size,
            tied_embedding=settings.tied_embedding,
            # Compiled programs don't know what their numbers are.
            embedding_scale=1.0,
            trained_positions=0,
            transformer=transformer,
        ),
        mesh=mesh,
        # Ulysses attends in natural order, whatever the devices hold.
        layout="contiguous" if variant.strategy == "ulysses" else settings.layout,
        strategy=variant.strategy,
        ulysses_size=variant.ulysses_size,
        weights_over_ring=mesh.sp > 1,
        context=tokens_a_device * mesh.sp,
        batch_size=mesh.fsdp,
        loss_chunks=chunks_of(tokens_a_device, settings.loss_block),
        optimizer=settings.optimizer,
        # On CPU devices that stand for GPUs only XLA's block compiles.
        attention_block="auto" if estimated else settings.attention_block,
        heads_at_once=None if variant.strategy == "dense" else settings.heads_at_once,
    )


def chunks_of(tokens: int, block: int) -> int:
    """The fewest equal chunks of at most `block` tokens each."""
    fewest = -(-tokens // block)
    return next(chunks for chunks in range(fewest, tokens + 1) if tokens % chunks == 0)


def divisible(transformer: TransformerConfig, devices: int) -> TransformerConfig:
    """The model with its width rounded up to a multiple of the devices that share it, its heads as much wider.

    LLaMA 3B's 3200 columns do not divide over 256 devices; the model of 3328, with heads of 104, is a little larger,
    so what fits of it fits of the other, too. Models that divide are returned as they are.
    """
    if transformer.width % devices == 0:
        return transformer
    # Heads of a multiple of 8, so that head dimensions stay even and tiles whole.
    step = math.lcm(devices, 8 * transformer.query_heads)
    width = -(-transformer.width // step) * step
    if transformer.width != transformer.query_heads * transformer.head_dim:
        width = -(-transformer.width // devices) * devices
        return dataclasses.replace(transformer, width=width)
    return dataclasses.replace(transformer, width=width, head_dim=width // transformer.query_heads)
