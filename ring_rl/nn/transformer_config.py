"""What a transformer is: its size, its parts, and in what memory it computes."""

import dataclasses
from typing import Literal

from ring_rl.kernels.feedforward import check_chunks
from ring_rl.kernels.halo import check_halo
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.rotary_scaling import RotaryScaling
from ring_rl.nn.saved_activations import SavedActivations, check_saved_activations

ComputeDtype = Literal["float32", "bfloat16"]
FeedForward = Literal["gelu", "swiglu", "none"]
# The fields of `TransformerConfig` that say in what memory the same function of the same parameters is computed.
MEMORY_CHOICES = ("feed_forward_chunks", "attention_block_size", "saved_activations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalAids:
    """What helps a small model to find one line among many; none of it is part of LLaMA.

    Attributes:
        convolution_width: Tokens that a residual causal depthwise convolution before each attention spans, the token's
            own included; 1 leaves it out.
        key_shift: Whether keys are mixed with those of the token before: (1 - a) k_t + a k_{t-1}, a learned for each
            key-value head (arXiv:2411.19574, for keys only).
        key_shift_initial: What a starts from.
        length_scaled_queries: Whether queries are multiplied by s log(position + 2), s learned for each query head, so
            that attention stays as sharp over more tokens (arXiv:2501.19399).
        length_scale_initial: What s starts from.
        keys_start_as_queries: Whether the key projection starts as a copy of the query projection (with fewer
            key-value heads, of the first query head of each group), so that equal tokens find one another at once.
    """

    convolution_width: int
    key_shift: bool
    key_shift_initial: float
    length_scaled_queries: bool
    length_scale_initial: float
    keys_start_as_queries: bool

    def __post_init__(self) -> None:
        if self.convolution_width < 1:
            raise ValueError(
                f"retrieval.convolution_width must be at least 1 (a token sees itself), got {self.convolution_width}"
            )
        if not 0 <= self.key_shift_initial <= 1:
            raise ValueError(f"retrieval.key_shift_initial must lie in [0, 1], got {self.key_shift_initial}")

    @property
    def tokens_back(self) -> int:
        """How many tokens before its own a layer reads outside of attention."""
        return max(self.convolution_width - 1, int(self.key_shift))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Parts, size and memory choices of a transformer.

    Attributes:
        layers: Number of blocks.
        width: Model width M.
        query_heads: Query heads H.
        key_value_heads: Key-value heads K; H must be a multiple of it.
        head_dim: Head dimension D.
        norm_epsilon: Added to the mean square that RMS norms divide by.
        feed_forward: "gelu" has one hidden layer and biases, "swiglu" a gated one without (arXiv:2002.05202); "none"
            leaves the feed-forward out.
        feed_forward_width: Hidden width F; not read with feed_forward="none".
        feed_forward_chunks: Steps in which the feed-forward runs; divides the tokens of a device.
        rotary_base: Base of the rotary frequencies.
        rotary_fraction: Share of the head's dimensions that turn with the position, the first ones; 0 is no positions.
        rotary_scaling: How frequencies are lowered for longer contexts than the trained one; None leaves them.
        no_position_layers: Indices of layers in which nothing turns.
        retrieval: Aids for finding lines; None is none.
        attention_window: How many tokens back a token sees, itself included; None is all of them.
        attention_block_size: Largest edge of a tile of scores, in tokens, where the local block leaves it open.
        saved_activations: What backward finds saved of a layer: "all", "products", "attention", "none" or
            "offload", as `ring_rl.nn.saved_activations` says.
        compute_dtype: Of activations and matrix products. Parameters, softmax, norms, rotary angles and sums of
            gradients over devices are float32 whatever it is.
    """

    layers: int
    width: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    norm_epsilon: float
    feed_forward: FeedForward
    feed_forward_width: int
    feed_forward_chunks: int
    rotary_base: float
    rotary_fraction: float
    rotary_scaling: RotaryScaling | None
    no_position_layers: tuple[int, ...]
    retrieval: RetrievalAids | None
    attention_window: int | None
    attention_block_size: int
    saved_activations: SavedActivations
    compute_dtype: ComputeDtype

    def __post_init__(self) -> None:
        sizes = (
            "layers",
            "width",
            "query_heads",
            "key_value_heads",
            "head_dim",
            *(("feed_forward_width",) if self.feed_forward != "none" else ()),
            "feed_forward_chunks",
            "attention_block_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"transformer.{name} must be at least 1, got {getattr(self, name)}")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"transformer.query_heads={self.query_heads} must be a multiple of "
                f"key_value_heads={self.key_value_heads}"
            )
        if not self.norm_epsilon > 0:
            raise ValueError(f"transformer.norm_epsilon must be positive, got {self.norm_epsilon}")
        self._check_positions()
        if self.attention_window is not None and self.attention_window < 1:
            raise ValueError(
                f"transformer.attention_window must be at least 1 (a token sees itself), got {self.attention_window}; "
                "null is no window"
            )

    def _check_positions(self) -> None:
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"transformer.rotary_fraction must lie in [0, 1], got {self.rotary_fraction}")
        if not self.rotary_base > 1:
            raise ValueError(f"transformer.rotary_base must be above 1, got {self.rotary_base}")
        turning = self.rotary_fraction * self.head_dim
        if turning != self.rotary_dim or self.rotary_dim % 2:
            raise ValueError(
                f"transformer.head_dim={self.head_dim} times rotary_fraction={self.rotary_fraction} must be even, for "
                f"rotary positions turn pairs of dimensions; got {turning:g}"
            )
        for index in self.no_position_layers:
            if not 0 <= index < self.layers:
                raise ValueError(
                    f"transformer.no_position_layers names layer {index}, but layers are 0 to {self.layers - 1}"
                )
        if len(set(self.no_position_layers)) < len(self.no_position_layers):
            raise ValueError(f"transformer.no_position_layers names a layer twice: {list(self.no_position_layers)}")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn."""
        return round(self.rotary_fraction * self.head_dim)

    @property
    def tokens_back(self) -> int:
        """How many tokens before its own a layer reads outside of attention."""
        return 0 if self.retrieval is None else self.retrieval.tokens_back

    def check(self, parallel: SequenceParallel, *, batch: int, length: int) -> None:
        """Raises ValueError unless the mesh can run this model on `batch` sequences of `length` tokens.

        Nothing is compiled, so an entry point can ask before it does anything else.
        """
        parallel.check(batch, length)
        parallel.check_heads(query_heads=self.query_heads, key_value_heads=self.key_value_heads)
        local_length = length // parallel.sequence_devices
        if self.feed_forward != "none":
            parallel.check_divides("feed_forward_width", self.feed_forward_width)
            check_chunks(local_length, chunks=self.feed_forward_chunks, of="feed-forward")
        if self.tokens_back:
            local = parallel.local()
            check_halo(
                local_length,
                self.tokens_back,
                layout=parallel.layout,
                ring_size=parallel.sequence_devices,
                axes=local.sequence_axes,
            )
        check_saved_activations(self.saved_activations, parallel.mesh)
