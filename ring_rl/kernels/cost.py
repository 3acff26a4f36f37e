"""What attention costs: floating-point operations, bytes between devices, bytes kept on a device.

T is the length of the whole sequence, n the number of devices that share it, c = T / n a device's share, e the bytes
of an element of q, k and v. Everything is per attention layer and counts the whole batch. Whether transfers hide
behind work is the matter of `overlap.py`, what to choose that of `choose.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ring_rl.kernels.layout import Layout, check_length, chunks_per_device
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.pairs import visible_pairs

Strategy = Literal["ring", "all_gather", "ulysses", "hybrid", "blockwise", "dense"]
STRATEGIES: tuple[Strategy, ...] = ("ring", "all_gather", "ulysses", "hybrid", "blockwise", "dense")

_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The arrays of one attention over a whole sequence.

    Attributes:
        batch: B.
        tokens: T, over all devices.
        query_heads: H.
        key_value_heads: K, which divides H.
        head_dim: D.
        element_bytes: e, of q, k and v: 2 in bfloat16, 4 in float32.
    """

    batch: int
    tokens: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    element_bytes: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"{self.query_heads} query heads do not share {self.key_value_heads} key-value heads evenly; "
                "make the former a multiple of the latter"
            )


@dataclasses.dataclass(frozen=True)
class Cost:
    """An amount for each direction of one training step: operations, or bytes a device sends."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.forward + self.backward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)


def attention_flops(shape: AttentionShape, *, mask: Mask, document_lengths: Sequence[int] | None = None) -> Cost:
    """Useful operations of attention on all devices together.

        forward     4 B H D pairs     q kᵀ and w v, a multiplication and an addition each
        backward   10 B H D pairs     q kᵀ again, d_out vᵀ, wᵀ d_out, d_logits k, d_logitsᵀ q

    Pairs that a mask hides count nothing, whether or not a kernel computes them; softmax and masks count nothing.
    This is the convention of FlashAttention-2, arXiv:2307.08691. `document_lengths` as in `visible_pairs`.
    """
    products = shape.batch * shape.query_heads * shape.head_dim * visible_pairs(mask, shape.tokens, document_lengths)
    return Cost(4 * products, 10 * products)


def transformer_flops(
    shape: AttentionShape,
    *,
    mask: Mask,
    layers: int,
    model_width: int,
    feed_forward_width: int,
    feed_forward_products: int,
    vocabulary: int,
    document_lengths: Sequence[int] | None = None,
) -> Cost:
    """Operations of one training step of a transformer, without those that rematerialisation repeats.

        forward    2 B T (layers (2 M H D + 2 M K D + m M F) + M V) + layers x attention
        backward   twice the matrix products, 5/2 of the attention

    With K = H, H D = M, F = 4 M, m = 2, no vocabulary and everything visible the forward pass is
    layers (24 B T M² + 4 B T² M), appendix D of arXiv:2310.01889.

    Args:
        shape: Arrays of each attention layer.
        mask: What may attend to what.
        layers: Number of layers.
        model_width: M.
        feed_forward_width: F.
        feed_forward_products: m, matrices of a feed-forward: 2, or 3 if it is gated.
        vocabulary: V, width of the last projection; 0 if there is none. Looking an embedding up is free.
        document_lengths: As in `visible_pairs`.
    """
    projections = 2 * model_width * shape.head_dim * (shape.query_heads + shape.key_value_heads)
    feed_forward = feed_forward_products * model_width * feed_forward_width
    weights = layers * (projections + feed_forward) + model_width * vocabulary
    forward = 2 * shape.batch * shape.tokens * weights
    attention = attention_flops(shape, mask=mask, document_lengths=document_lengths)
    return Cost(forward, 2 * forward) + Cost(layers * attention.forward, layers * attention.backward)


@dataclasses.dataclass(frozen=True)
class Halo:
    """What a chunk of queries needs of the chunks around it under a window.

    Attributes:
        keys_back: How many keys before the chunk.
        keys_ahead: How many keys after it.
    """

    keys_back: int
    keys_ahead: int


def window_halo(mask: Mask, *, layout: Layout, tokens: int, ring_size: int) -> Halo | None:
    """The neighbours' keys that replace the ring's full circle, or None where that circle is no longer.

    A chunk (T / n tokens; in zigzag, of which a device holds two, T / 2n) needs the W - 1 keys before it and, if the
    mask is not causal, the W - 1 after it; block causality can ask for the rest of a block ahead (`Mask.reach`). That
    is done where it is less than the (n - 1) T / n keys of the circle, which for plain causality and a contiguous
    layout means a window of at most that. In a striped layout every device holds keys of every window, so nothing can
    be left out.

    Raises:
        ValueError: The ring does not divide the sequence.
    """
    check_length(tokens, ring_size=ring_size, layout=layout)
    back, ahead = mask.reach()
    if layout == "striped" or back is None or ahead is None:
        return None
    around = chunks_per_device(layout) * (back + ahead)
    return Halo(back, ahead) if around < (ring_size - 1) * (tokens // ring_size) else None


def traffic(
    shape: AttentionShape, *, strategy: Strategy, mask: Mask, layout: Layout, axis_size: int | tuple[int, int]
) -> Cost:
    """Bytes that a device sends to others, and as many that it receives; the busiest device where they differ.

        ring          forward (n-1) 2 B c K D e; backward as much and (n-1) 2 B c K D 4 of float32 dk, dv
        ring, window  the same with the keys of a halo in place of (n-1) c (`window_halo`)
        all_gather    as the ring: gather k, v; in backward gather again and reduce-scatter float32 dk, dv
        ulysses       (n-1)/n B c (2 H + 2 K') D e: q, k, v and out change places; in backward d_out, dq, dk, dv
        hybrid        Ulysses in groups of u, then a ring of r of the K' / u heads of c u tokens
        blockwise     nothing, as dense: the whole sequence is on one device

    K' is K, or u where u is a multiple of K: keys and values are then repeated, a head for each device. Left out are
    the log-sum-exp (2 / D of out's bytes in bfloat16) and positions and segment ids, which do not grow with H D.
    Ulysses: arXiv:2309.14509.

    Args:
        shape: Arrays of the attention.
        strategy: How the devices share it.
        mask: What may attend to what.
        layout: Which tokens a device holds.
        axis_size: Devices n; for hybrid (r, u), rings first.

    Raises:
        ValueError: The devices divide the tokens or the heads unevenly, or `axis_size` does not suit the strategy.
    """
    ring_size, ulysses_size = _sizes(strategy, axis_size)
    share = _share(shape, strategy=strategy, layout=layout, ring_size=ring_size, ulysses_size=ulysses_size)
    heads = exchanged_key_value_heads(shape, ulysses_size=ulysses_size)
    row_bytes = shape.batch * shape.head_dim * shape.element_bytes
    exchanged = (ulysses_size - 1) * share * 2 * (shape.query_heads + heads) * row_bytes // ulysses_size
    # What one ring sends of each key that it moves: k and v, and in backward the sums of dk and dv besides.
    per_key = 2 * shape.batch * (heads // ulysses_size) * shape.head_dim
    moved = (ring_size - 1) * share * ulysses_size
    halo = window_halo(mask, layout=layout, tokens=shape.tokens, ring_size=ring_size)
    if halo is not None and strategy in ("ring", "hybrid"):
        moved = _received_halo_keys(halo, layout=layout, tokens=shape.tokens, ring_size=ring_size)
    key_values = moved * per_key * shape.element_bytes
    return Cost(exchanged + key_values, exchanged + key_values + moved * per_key * _FLOAT32_BYTES)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        saved: Kept of every layer from forward to backward.
        forward_buffers: Besides, while forward runs: one layer at a time.
        backward_buffers: Besides, while backward runs.
    """

    saved: int
    forward_buffers: int
    backward_buffers: int


def memory(
    shape: AttentionShape,
    *,
    strategy: Strategy,
    layout: Layout,
    axis_size: int | tuple[int, int],
    heads_at_once: int | None = None,
) -> Memory:
    """Bytes that attention occupies on one device, without accumulators and tiles, which all strategies share.

        saved        q, k, v, out of c tokens and their log-sum-exp: B c (2 H + 2 K) D e + 4 B c H
        ring         buffers: the shards of k, v at work and arriving, 2 x 2 B c K D e (n = 2: one of them); in backward
                     also as many of dk, dv in float32
        all_gather   buffers: all keys and values, 2 B T K D e; in backward also all dk, dv in float32
        ulysses      saved after the exchange, K' heads for K (see `traffic`); buffers: the other side of the exchange,
                     B c (2 H + 2 K') D e, in backward for d_out, dq, dk, dv
        hybrid       both: Ulysses' and a ring's of r
        blockwise    no buffers
        dense        buffers: logits in float32, 4 B H T²; in backward weights and their gradients, twice that

    A window's halo needs no more than the ring's buffers. With `heads_at_once` the buffers of ring and all_gather are
    those of so many key-value heads (at most, and a divisor of all) of one row. Other arguments and errors as in
    `traffic`.
    """
    ring_size, ulysses_size = _sizes(strategy, axis_size)
    share = _share(shape, strategy=strategy, layout=layout, ring_size=ring_size, ulysses_size=ulysses_size)
    heads = exchanged_key_value_heads(shape, ulysses_size=ulysses_size)
    row_bytes = shape.batch * shape.head_dim * shape.element_bytes
    activations = share * 2 * (shape.query_heads + heads) * row_bytes
    saved = activations + _FLOAT32_BYTES * shape.batch * share * shape.query_heads
    if strategy == "dense":
        logits = _FLOAT32_BYTES * shape.batch * shape.query_heads * shape.tokens**2
        return Memory(saved, logits, 2 * logits)
    shards = ring_size if strategy == "all_gather" else min(2, ring_size - 1)
    rows, heads_together = shape.batch, heads
    if heads_at_once is not None:
        rows, heads_together = 1, largest_divisor(heads, at_most=heads_at_once)
    elements = shards * 2 * rows * share * heads_together * shape.head_dim
    other_side = activations if ulysses_size > 1 else 0
    forward = other_side + elements * shape.element_bytes
    return Memory(saved, forward, forward + elements * _FLOAT32_BYTES)


def largest_divisor(number: int, *, at_most: int) -> int:
    """The largest divisor that is not above `at_most`: heads are worked on in equal groups.

    Raises:
        ValueError: `at_most` is below 1.
    """
    if at_most < 1:
        raise ValueError(f"a group has at least 1 of the {number}, got at_most={at_most}")
    return max(size for size in range(1, min(at_most, number) + 1) if number % size == 0)


def exchanged_key_value_heads(shape: AttentionShape, *, ulysses_size: int) -> int:
    """K', the key-value heads that Ulysses deals out to `ulysses_size` devices, repeated where there are too few.

    Raises:
        ValueError: Heads cannot be dealt out evenly.
    """
    if shape.query_heads % ulysses_size:
        raise ValueError(
            f"{shape.query_heads} query heads cannot be dealt out to {ulysses_size} devices; "
            "use a divisor of the heads, or a ring"
        )
    if shape.key_value_heads % ulysses_size and ulysses_size % shape.key_value_heads:
        raise ValueError(
            f"{shape.key_value_heads} key-value heads neither divide {ulysses_size} devices nor are divided by them; "
            "use another number of devices, or a ring"
        )
    return max(shape.key_value_heads, ulysses_size)


def _sizes(strategy: Strategy, axis_size: int | tuple[int, int]) -> tuple[int, int]:
    """(r, u): the devices among which keys travel, and those among which heads are dealt out."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if isinstance(axis_size, tuple) != (strategy == "hybrid"):
        form = "(ring size, Ulysses size)" if strategy == "hybrid" else "one number of devices"
        raise ValueError(f"axis_size of {strategy} is {form}, got {axis_size}")
    ring_size, ulysses_size = axis_size if isinstance(axis_size, tuple) else (axis_size, 1)
    if min(ring_size, ulysses_size) < 1:
        raise ValueError(f"axis_size must be at least 1, got {axis_size}")
    if strategy in ("blockwise", "dense") and axis_size != 1:
        raise ValueError(f"{strategy} has the whole sequence on one device: axis_size must be 1, got {axis_size}")
    return (1, ring_size) if strategy == "ulysses" else (ring_size, ulysses_size)


def _share(shape: AttentionShape, *, strategy: Strategy, layout: Layout, ring_size: int, ulysses_size: int) -> int:
    """c, the tokens of one device.

    With hybrid the layout is the rings', whose parts are then cut once more into u.
    """
    check_length(shape.tokens, ring_size=ulysses_size if strategy == "ulysses" else ring_size, layout=layout)
    if shape.tokens % (ring_size * ulysses_size):
        raise ValueError(
            f"sequence length {shape.tokens} is not divisible by the {ring_size * ulysses_size} devices of {strategy}; "
            f"pad to {-(-shape.tokens // (ring_size * ulysses_size)) * ring_size * ulysses_size}"
        )
    return shape.tokens // (ring_size * ulysses_size)


def _received_halo_keys(halo: Halo, *, layout: Layout, tokens: int, ring_size: int) -> int:
    """Keys that the busiest device receives: those of its chunks' halos that it does not hold itself."""
    chunks = ring_size * chunks_per_device(layout)
    chunk = tokens // chunks
    owner = [min(i, chunks - 1 - i) if layout == "zigzag" else i for i in range(chunks)]
    received = [0] * ring_size
    for i in range(chunks):
        for reach, step in ((halo.keys_back, -1), (halo.keys_ahead, 1)):
            for hop in range(-(-reach // chunk)):
                j = i + step * (hop + 1)
                if 0 <= j < chunks and owner[j] != owner[i]:
                    received[owner[i]] += min(chunk, reach - hop * chunk)
    return max(received)
