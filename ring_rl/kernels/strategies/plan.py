"""Everything about one attention that is known when it is compiled, and what follows from it."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.dropout import Dropout, query_row_bits
from ring_rl.kernels.layout import Layout, chunks_per_device, local_positions
from ring_rl.kernels.local.block import DIAGONAL, EVERYTHING, LocalBlock, Relation, Scoring
from ring_rl.kernels.mask import CAUSAL, Mask
from ring_rl.kernels.tokens import Keys, Queries
from ring_rl.typing import Array, Float32, Int32

# What a device's queries and a visiting shard have to do with one another; `hop.py` says what each does.
HopKind = Literal["everything", "zigzag", "earlier", "by_position"]


class Side(NamedTuple):
    """What attention is told besides q, k and v; sharded like them where it has a token axis."""

    positions: Int32[Array, "b T"] | None = None
    segment_ids: Int32[Array, "B T"] | None = None
    alibi_slopes: Float32[Array, " H"] | None = None
    dropout: Dropout | None = None

    def of_heads(self, first: Array | int, heads: int) -> "Side":
        """What concerns the query heads `first` to `first + heads`."""
        slopes, dropout = self.alibi_slopes, self.dropout
        return self._replace(
            alibi_slopes=None if slopes is None else lax.dynamic_slice_in_dim(slopes, first, heads),
            dropout=dropout and dataclasses.replace(dropout, first_head=dropout.first_head + first),
        )

    def of_row(self, row: Array | int) -> "Side":
        """What concerns one row of the batch."""
        one = lambda x: x if x is None or x.shape[0] == 1 else lax.dynamic_slice_in_dim(x, row, 1)  # noqa: E731
        dropout = self.dropout
        return self._replace(
            positions=one(self.positions),
            segment_ids=one(self.segment_ids),
            dropout=dropout and dataclasses.replace(dropout, first_row=dropout.first_row + row),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How q, k and v that are sharded over one mesh axis meet.

    Attributes:
        axis_name: The mesh axis, or None for a sequence that is all here.
        size: Devices on that axis.
        layout: Which tokens a device holds, unless positions are given.
        placed: Whether positions are given: then nothing about them is known now.
        mask: What may attend to what.
        scoring: How logits become weights.
        local: The block that computes a rectangle.
        looks_at_positions: Whether that block serves rectangles whose positions only the running program knows.
        prefers_positions: Whether it serves those as fast as rectangles that are visible in full.
        heads_at_once: Key-value heads of one batch row that are worked on at a time, at most; None is all of all rows.
    """

    axis_name: str | None
    size: int
    layout: Layout
    placed: bool
    mask: Mask
    scoring: Scoring
    local: LocalBlock
    looks_at_positions: bool
    prefers_positions: bool
    heads_at_once: int | None

    @property
    def index(self) -> Array | int:
        """This device's place on the axis."""
        return 0 if self.axis_name is None else lax.axis_index(self.axis_name)

    def send(self, tree, *, by: int = 1):
        """What the device `by` places back holds; this device's goes as many places on."""
        around = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, around), tree)

    def queries(self, q: Array, side: Side) -> Queries:
        """This device's queries with all that masks and biases need."""
        positions = self.positions(q.shape[2], self.index) if side.positions is None else side.positions
        slopes = None if side.alibi_slopes is None else side.alibi_slopes[None]
        row_bits = None
        if side.dropout is not None:
            row_bits = query_row_bits(side.dropout, positions=positions, batch=q.shape[0], heads=q.shape[1])
        return Queries(q, positions, side.segment_ids, slopes, row_bits)

    def keys(self, held: "Held", device: Array | int) -> Keys:
        """The keys that `device` started with, wherever they are now."""
        k, v = held.kv
        positions = self.positions(k.shape[2], device) if held.positions is None else held.positions
        return Keys(k, v, positions, held.segment_ids)

    def positions(self, length: int, device: Array | int) -> Int32[Array, "1 T"]:
        """Global positions of the `length` tokens of `device`."""
        shard = local_positions(length, device=device, ring_size=self.size, layout=self.layout)
        return jnp.asarray(shard, jnp.int32)[None]

    def chunk(self, length: int) -> int:
        """Tokens in one stretch of the sequence that a device with `length` tokens holds."""
        return length // chunks_per_device(self.layout)

    def blocks_fit(self, length: int) -> bool:
        """Whether no block of a block-causal mask lies across two chunks."""
        return self.size == 1 or self.chunk(length) % self.mask.causal_block_size == 0

    def own_relation(self, length: int) -> Relation:
        """What a device's own queries and keys have to do with one another."""
        if not self.mask.needs_positions:
            return EVERYTHING
        if self.placed:
            return Relation(self.mask)
        if self.mask == CAUSAL:
            return DIAGONAL  # every layout holds its tokens in ascending order
        unit_stride = self.size == 1 or self.layout == "contiguous"
        chunkwise = self.layout == "zigzag" and self.mask.window is None
        if (unit_stride or chunkwise) and self.blocks_fit(length):
            return Relation(self.mask, 0)
        return Relation(self.mask)

    def hop_kind(self, length: int) -> HopKind:
        """What a visiting shard of keys has to do with this device's queries."""
        if not self.mask.needs_positions:
            return "everything"
        if not self.placed and self.mask.window is None and self.blocks_fit(length):
            if self.layout == "zigzag" and not self.prefers_positions:
                return "zigzag"
            if self.layout == "contiguous" and not self.looks_at_positions:
                return "earlier"
        return "by_position"


class Held(NamedTuple):
    """What travels of a shard of keys: k and v as one array, so that there are half as many transfers to wait for."""

    kv: Array
    positions: Int32[Array, "b S"] | None
    segment_ids: Int32[Array, "B S"] | None

    @staticmethod
    def of(k: Array, v: Array, side: Side) -> "Held":
        """This device's own, before it has gone anywhere."""
        return Held(jnp.stack([k, v]), side.positions, side.segment_ids)
