"""The Pallas kernels of the TPU block: one tile of scores each, in VMEM, transposed.

A tile of scores is [keys, queries], so that whatever belongs to a query (its maximum, its sum, its log_sum_exp, its
position) is a row of lanes: reductions run over sublanes, and no vector is ever turned on its side but the keys'
positions. References to what an attention does not use are None.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ring_rl.kernels.local.block import Scoring
from ring_rl.typing import Array

# Of a logit that is hidden, and the least maximum of a row: exp(hidden - maximum) = 0 even where a row has seen
# nothing yet, and nothing is ever inf - inf.
HIDDEN = float(np.finfo(np.float32).min)
LEAST_MAXIMUM = HIDDEN / 2


class Reach(NamedTuple):
    """Scalars that say which tiles along a row (or column) of tiles are reachable and which are open, `tiles.Bounds`.

    Each is [b, rows], b being 1 where the rows of the batch agree. `slopes` is ALiBi's [b, H].
    """

    first: Array
    open_first: Array
    open_stop: Array
    stop: Array
    slopes: Array | None = None


class Operands(NamedTuple):
    """What kernels read: arrays outside, references to a tile of each inside; None for what is not needed.

    q, k, v and d_out are [B, heads, tokens, D]; log_sum_exp and delta [B, H, 1, T]; the others [b, 1, tokens]. A query
    sees the keys with low <= key position < high, and of its own segment.
    """

    q: Any
    k: Any
    v: Any
    low: Any
    high: Any
    key_positions: Any
    query_segments: Any
    key_segments: Any
    alibi_query_positions: Any
    alibi_key_positions: Any
    d_out: Any
    log_sum_exp: Any
    delta: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How a tile of scores is made of its operands."""

    scoring: Scoring
    operands: Operands
    slope: Array | None

    def product(self) -> Array:
        """k qᵀ, [keys, queries], summed in float32."""
        return dot(self.operands.k[...], self.operands.q[...], ((1,), (1,)))

    def logits(self, product: Array) -> Array:
        """Scale, cap and bias."""
        logits = self.scoring.scale * product
        if self.scoring.soft_cap is not None:
            logits = self.scoring.soft_cap * jnp.tanh(logits / self.scoring.soft_cap)
        if self.slope is not None:
            p, s = self.operands.alibi_query_positions, self.operands.alibi_key_positions
            logits = logits - self.slope * jnp.abs(p[...] - _column(s)).astype(jnp.float32)
        return logits

    def shown(self) -> Array | None:
        """Which of the tile's queries see which of its keys; None is all of them."""
        x = self.operands
        shown = None
        if x.low is not None and x.high is not None:
            s = _column(x.key_positions)
            shown = (x.low[...] <= s) & (s < x.high[...])
        if x.query_segments is not None:
            same = x.query_segments[...] == _column(x.key_segments)
            shown = same if shown is None else shown & same
        return shown

    def weights(self, product: Array, *, masked: bool) -> Array:
        """The global softmax's weights, from the global log_sum_exp."""
        weights = jnp.exp(self.logits(product) - self.operands.log_sum_exp[...])
        shown = self.shown() if masked else None
        return weights if shown is None else jnp.where(shown, weights, 0.0)

    def d_logits(self, product: Array, weights: Array) -> Array:
        """Gradient in scale q·k, of which backward's products are made."""
        d_weights = dot(self.operands.v[...], self.operands.d_out[...], ((1,), (1,)))
        d_logits = weights * (d_weights - self.operands.delta[...])
        if self.scoring.soft_cap is not None:
            d_logits = d_logits * (1.0 - jnp.square(jnp.tanh(self.scoring.scale * product / self.scoring.soft_cap)))
        return d_logits


def forward_kernel(
    reach, operands, out_ref, lse_ref, accT, maximum, denominator, *, tiles_along: int, scoring: Scoring
):
    """Grid (batch, heads, tiles of queries, tiles of keys): online softmax along the last."""
    step = _Step.of(reach, Place.here(tiles_along))
    tile = Tile(scoring=scoring, operands=operands, slope=step.slope)

    @pl.when(step.is_first)
    def _():
        accT[...] = jnp.zeros_like(accT)
        maximum[...] = jnp.full_like(maximum, LEAST_MAXIMUM)
        denominator[...] = jnp.zeros_like(denominator)

    def attend(masked: bool) -> None:
        scores = tile.logits(tile.product())
        shown = tile.shown() if masked else None
        if shown is not None:
            scores = jnp.where(shown, scores, HIDDEN)
        new_maximum = jnp.maximum(maximum[...], jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - new_maximum)
        rescale = jnp.exp(maximum[...] - new_maximum)
        denominator[...] = rescale * denominator[...] + jnp.sum(weights, axis=0, keepdims=True)
        v = operands.v[...]
        accT[...] = rescale * accT[...] + dot(v, weights.astype(v.dtype), ((0,), (0,)))
        maximum[...] = new_maximum

    step.run(attend)

    @pl.when(step.is_last)
    def _():
        seen = denominator[...] > 0
        divisor = jnp.where(seen, denominator[...], 1.0)
        out_ref[...] = (accT[...] / divisor).T
        lse_ref[...] = jnp.where(seen, maximum[...] + jnp.log(divisor), -jnp.inf)


def d_queries_kernel(reach, operands, dq_ref, *, tiles_along: int, scoring: Scoring):
    """Grid (batch, heads, tiles of queries, tiles of keys): dq, summed along the last."""
    step = _Step.of(reach, Place.here(tiles_along))
    tile = Tile(scoring=scoring, operands=operands, slope=step.slope)

    @pl.when(step.is_first)
    def _():
        dq_ref[...] = jnp.zeros_like(dq_ref)

    def add(masked: bool) -> None:
        product = tile.product()
        d_logits = tile.d_logits(product, tile.weights(product, masked=masked))
        k = operands.k[...]
        dq_ref[...] += scoring.scale * dot(d_logits.astype(k.dtype), k, ((0,), (0,)))

    step.run(add)


def d_keys_kernel(reach, operands, dk_ref, dv_ref, *, tiles_along: int, scoring: Scoring):
    """Grid (batch, key-value heads, tiles of keys, heads of a group x tiles of queries): dk, dv along the last."""
    step = _Step.of(reach, Place.here(tiles_along))
    tile = Tile(scoring=scoring, operands=operands, slope=step.slope)

    @pl.when(step.is_first)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    def add(masked: bool) -> None:
        product = tile.product()
        weights = tile.weights(product, masked=masked)
        q, d_out = operands.q[...], operands.d_out[...]
        dv_ref[...] += dot(weights.astype(d_out.dtype), d_out, ((1,), (0,)))
        d_logits = tile.d_logits(product, weights)
        dk_ref[...] += scoring.scale * dot(d_logits.astype(q.dtype), q, ((1,), (0,)))

    step.run(add)


class Place(NamedTuple):
    """Where a step of a grid stands: its row of tiles, its tile along that row, and its row of the batch and head."""

    batch: Array
    head: Array
    row: Array
    along: Array
    is_first: Array
    is_last: Array

    @staticmethod
    def here(tiles_along: int) -> "Place":
        """Of a grid (batch, heads, rows, tiles along a row), the last for one head of a group after the other."""
        step, steps = pl.program_id(3), pl.num_programs(3)
        head = pl.program_id(1) * (steps // tiles_along) + step // tiles_along
        return Place(pl.program_id(0), head, pl.program_id(2), step % tiles_along, step == 0, step == steps - 1)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a step of the grid has to do."""

    is_first: Array
    is_last: Array
    reachable: Array
    is_open: Array
    slope: Array | None

    @staticmethod
    def of(reach: Reach, place: Place) -> "_Step":
        along = place.along
        at = lambda x: batch_row(x, place.batch, place.row)  # noqa: E731
        return _Step(
            place.is_first,
            place.is_last,
            (along >= at(reach.first)) & (along < at(reach.stop)),
            (along >= at(reach.open_first)) & (along < at(reach.open_stop)),
            None if reach.slopes is None else batch_row(reach.slopes, place.batch, place.head),
        )

    def run(self, body) -> None:
        """`body(masked)` for the tile at hand, without its mask where everything is visible."""
        pl.when(self.reachable & self.is_open)(lambda: body(False))
        pl.when(self.reachable & ~self.is_open)(lambda: body(True))


def batch_row(x, batch: Array, column: Array) -> Array:
    """Scalar x[batch, column], where a single row stands for the whole batch."""
    return x[0 if x.shape[0] == 1 else batch, column]


def dot(a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """The product of two tiles, summed in float32; float32 operands are multiplied as such, not as bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _column(row) -> Array:
    """[1, n] as [n, 1]."""
    return jnp.expand_dims(row[0], -1)
