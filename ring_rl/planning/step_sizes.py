"""What one device holds and does of a training step, in numbers: the base of memory, time and mesh planning.

Nothing is compiled and no device is asked, so thousands of meshes can be looked at in a second.
"""

from __future__ import annotations

import dataclasses
import math

from ring_rl.kernels.cost import AttentionShape, largest_divisor
from ring_rl.kernels.cost import Strategy as AttentionStrategy
from ring_rl.kernels.feedforward import check_chunks
from ring_rl.kernels.layout import check_length
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.strategies.ulysses import check_heads
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.planning.compiled_step import StepRequest
from ring_rl.training.mesh import MeshConfig

__all__ = ["OPTIMIZER_MOMENTS", "ParameterGroup", "StepSizes"]

# Arrays of a parameter's shape that an optimizer keeps; Adafactor's row and column sums are a few thousandths.
OPTIMIZER_MOMENTS: dict[str, int] = {"adamw": 2, "adam": 2, "lion": 1, "adafactor": 0}


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are sharded alike.

    Attributes:
        elements: In the whole model, of one layer if `layered`.
        layered: Whether every layer has as many.
        over_width: Whether the weight axes share them.
        over_tensor: Whether the tensor axis shares them.
        multiplied: Whether they multiply activations.
    """

    elements: int
    layered: bool
    over_width: bool
    over_tensor: bool
    multiplied: bool


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """A language model's training step on a mesh: one microbatch, and how many of them.

    Attributes:
        request: What would be compiled; the sizes of its mesh are all given, none is -1. Its batch is a microbatch.
        microbatches: How many of them a step sums the gradients of.
    """

    request: StepRequest
    microbatches: int = 1

    def __post_init__(self) -> None:
        request, config, mesh = self.request, self.transformer, self.mesh
        if self.microbatches < 1:
            raise ValueError(f"microbatches must be at least 1, got {self.microbatches}")
        if min(dataclasses.astuple(mesh)) < 1:
            raise ValueError(f"a plan needs the size of every mesh axis, got {mesh}; put a number in place of -1")
        if request.strategy == "auto":
            raise ValueError("strategy='auto' is chosen on the devices; plan for ring, all_gather, ulysses or hybrid")
        if request.ulysses_size < 1 or mesh.sp % request.ulysses_size:
            raise ValueError(f"ulysses_size={request.ulysses_size} does not divide sp={mesh.sp}; choose a divisor")
        if request.ulysses_size > 1 and request.strategy != "hybrid":
            raise ValueError(
                f"ulysses_size={request.ulysses_size} means nothing to {request.strategy}; use strategy='hybrid'"
            )
        if request.strategy == "dense" and mesh.sp > 1:
            raise ValueError(f"strategy='dense' needs each sequence whole on a device, got sp={mesh.sp}")
        if request.batch_size % (mesh.dp * mesh.fsdp):
            raise ValueError(
                f"batch of {request.batch_size} sequences is not divisible by dp={mesh.dp} x fsdp={mesh.fsdp}; "
                f"use a multiple of {mesh.dp * mesh.fsdp}"
            )
        check_length(request.context, ring_size=self.ring_size, layout=request.layout)
        if request.context % mesh.sp:
            raise ValueError(f"context {request.context} is not divisible by sp={mesh.sp}; pad it to a multiple")
        share = request.context // mesh.sp
        check_chunks(share, chunks=request.loss_chunks, of="loss")
        if config.feed_forward != "none":
            check_chunks(share, chunks=config.feed_forward_chunks, of="feed-forward")
        for name, size in (
            ("query_heads", config.query_heads),
            ("key_value_heads", config.key_value_heads),
            ("feed_forward_width", config.feed_forward_width if config.feed_forward != "none" else 0),
        ):
            if size % mesh.tp:
                raise ValueError(f"{name}={size} cannot be shared by tp={mesh.tp}; choose a divisor")
        if config.width % self.weight_shards:
            raise ValueError(
                f"width={config.width} cannot be shared by the {self.weight_shards} devices of the weight axes; "
                "choose sizes whose product divides it, or set weights_over_ring=false"
            )
        check_heads(
            query_heads=config.query_heads // mesh.tp,
            key_value_heads=config.key_value_heads // mesh.tp,
            devices=self.exchange_size,
        )

    @property
    def transformer(self) -> TransformerConfig:
        """What is between embedding and head."""
        return self.request.model.transformer

    @property
    def mesh(self) -> MeshConfig:
        """Devices along each axis."""
        return self.request.mesh

    @property
    def moments(self) -> int:
        """Arrays of a parameter's shape that the optimizer keeps."""
        return OPTIMIZER_MOMENTS[self.request.optimizer.name]

    @property
    def devices(self) -> int:
        """All of them."""
        return math.prod(dataclasses.astuple(self.mesh))

    @property
    def exchange_size(self) -> int:
        """Devices that swap tokens for heads."""
        return self.mesh.sp if self.request.strategy == "ulysses" else self.request.ulysses_size

    @property
    def ring_size(self) -> int:
        """Devices, or groups of them, that the layout deals a sequence out to."""
        return self.mesh.sp // self.request.ulysses_size

    @property
    def key_heads_together(self) -> int:
        """Of `key_heads`, those of one sequence that are worked on at a time."""
        heads, asked = self.key_heads, self.request.heads_at_once
        return heads if asked is None else largest_divisor(heads, at_most=asked)

    @property
    def key_heads(self) -> int:
        """Key-value heads that a device attends to, once tokens and heads have changed places."""
        return max(self.attention_shape().key_value_heads, self.exchange_size) // self.exchange_size

    @property
    def keys_travel(self) -> bool:
        """Whether keys go from device to device while others are worked on."""
        return self.attention_strategy in ("ring", "hybrid") and self.ring_size > 1

    @property
    def recomputes_feed_forward(self) -> bool:
        """Whether backward computes hidden units of the feed-forward again; with everything saved, if it has chunks."""
        saved = self.transformer.saved_activations
        return saved not in ("products", "all") or (saved == "all" and self.transformer.feed_forward_chunks > 1)

    @property
    def weight_shards(self) -> int:
        """Devices that share the width of the weights."""
        return self.mesh.fsdp * (self.mesh.sp if self.request.weights_over_ring else 1)

    @property
    def rows(self) -> int:
        """Sequences of a microbatch that a device has a share of."""
        return self.request.batch_size // (self.mesh.dp * self.mesh.fsdp)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch that a device holds."""
        return self.rows * self.request.context // self.mesh.sp

    @property
    def step_tokens(self) -> int:
        """Tokens that a whole step learns from."""
        return self.microbatches * self.request.batch_size * self.request.context

    @property
    def element_bytes(self) -> int:
        """Of activations and matrix products."""
        return 2 if self.transformer.compute_dtype == "bfloat16" else 4

    @property
    def mask(self) -> Mask:
        """What the model's attention sees."""
        return Mask(causal=True, window=self.transformer.attention_window)

    @property
    def attention_strategy(self) -> AttentionStrategy:
        """As `ring_rl.kernels.cost` calls it."""
        strategy = self.request.strategy
        assert strategy != "auto"
        return "blockwise" if self.mesh.sp == 1 and strategy != "dense" else strategy

    @property
    def attention_axis(self) -> int | tuple[int, int]:
        """The `axis_size` of `ring_rl.kernels.cost`."""
        if self.attention_strategy == "hybrid":
            return self.ring_size, self.request.ulysses_size
        return self.mesh.sp

    def attention_shape(self) -> AttentionShape:
        """Attention of the sequences that a device has a share of, and of its heads."""
        config = self.transformer
        return AttentionShape(
            batch=self.rows,
            tokens=self.request.context,
            query_heads=config.query_heads // self.mesh.tp,
            key_value_heads=config.key_value_heads // self.mesh.tp,
            head_dim=config.head_dim,
            element_bytes=self.element_bytes,
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters of the model, by how they are sharded."""
        config = self.transformer
        width, hidden = config.width, config.feed_forward_width
        heads = 2 * width * config.head_dim * (config.query_heads + config.key_value_heads)
        matrices = {"none": 0, "gelu": 2, "swiglu": 3}[config.feed_forward]
        biases = hidden if config.feed_forward == "gelu" else 0
        vectors = width * (1 + (config.feed_forward != "none") + (config.feed_forward == "gelu"))
        small = 0
        if config.retrieval is not None:
            if config.retrieval.convolution_width > 1:
                vectors += width * (1 + config.retrieval.convolution_width)
            small += config.key_value_heads * config.retrieval.key_shift
            small += config.query_heads * config.retrieval.length_scaled_queries
        vocabulary_shared = self.request.model.vocabulary_size % self.mesh.tp == 0
        ends = self.request.model.vocabulary_size * width
        head = ParameterGroup(ends, False, True, vocabulary_shared, multiplied=True)
        looked_up = ParameterGroup(ends, False, True, vocabulary_shared, multiplied=False)
        return [
            ParameterGroup(heads, True, True, True, multiplied=True),
            ParameterGroup(matrices * width * hidden, True, True, True, multiplied=True),
            ParameterGroup(biases + small, True, False, True, multiplied=False),
            ParameterGroup(vectors, True, True, False, multiplied=False),
            ParameterGroup(width, False, True, False, multiplied=False),
            head,
            *(() if self.request.model.tied_embedding else (looked_up,)),
        ]

    def parameters(self) -> int:
        """Of the whole model."""
        return sum(g.elements * (self.transformer.layers if g.layered else 1) for g in self.parameter_groups())

    def held_parameters(self) -> int:
        """Of them what one device holds."""
        return sum(self.held(g) * (self.transformer.layers if g.layered else 1) for g in self.parameter_groups())

    def held(self, group: ParameterGroup) -> int:
        """What one device holds of a group, of one layer."""
        shards = (self.weight_shards if group.over_width else 1) * (self.mesh.tp if group.over_tensor else 1)
        return group.elements // shards

    def gathered(self, group: ParameterGroup) -> int:
        """What one device has of a group, of one layer, while it uses it."""
        return group.elements // (self.mesh.tp if group.over_tensor else 1)
