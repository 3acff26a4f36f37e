"""The local block in plain XLA: tiles of queries against tiles of keys, online softmax between them.

Runs on every platform and serves every mask and option. On a CPU, where it serves those who have no C++ compiler, the
operand order of a matrix product decides its speed, so every product below is a plain row-by-column one: keys are
stored transposed once, and the backward works on transposed scores, so that nothing contracts the row index of a large
operand. And there a tile of scores must stay in a core's cache, so that strategies pass it one head at a time.

The G query heads that share a key-value head are folded into the rows of a tile, [B K, G * tile, D], so that keys and
values of grouped-query attention are never repeated. Rows of the batch and key-value heads are one axis: with two of
them XLA lays products out in another order and copies every tile of scores.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_rl.kernels.accumulate import float32_einsum
from ring_rl.kernels.dropout import kept
from ring_rl.kernels.local.block import Demand, Relation, Scoring
from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.local.tiles import Bounds, Tiling, bounds, visible_tiles
from ring_rl.kernels.mask import visible
from ring_rl.kernels.tokens import Cotangents, Keys, Queries
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Float32

# Of a logit that is hidden, and the least maximum of a row: exp(hidden - maximum) = 0 even where a row has seen
# nothing yet, and nothing is ever inf - inf.
_HIDDEN = float(np.finfo(np.float32).min)
_LEAST_MAXIMUM = _HIDDEN / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaBlock:
    """Blockwise attention, O(visible tiles) work and O(T D) memory beyond a tile of scores a head.

    Attributes:
        block_size: Largest edge of a tile, in tokens. Lengths need not be multiples of it.
        heads_at_once: How many key-value heads of one batch row a strategy should pass at a time; None is all.
        prefers_positions: Whether a strategy should leave it to the block to skip tiles that nobody sees. A loop of
            that many steps costs a CPU nothing; a virtual ring, whose loops run as long as the longest, loses by it.
    """

    block_size: int
    heads_at_once: int | None = None
    prefers_positions: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {self.block_size}")
        if self.heads_at_once is not None and self.heads_at_once < 1:
            raise ValueError(f"heads_at_once must be at least 1, or None for all; got {self.heads_at_once}")

    @property
    def looks_at_positions(self) -> bool:
        """Yes."""
        return True

    def refusal(self, demand: Demand) -> str | None:
        """None: it serves everything."""
        del demand
        return None

    def forward(
        self, queries: Queries, keys: Keys, *, relation: Relation, scoring: Scoring, tie: Tie = untied
    ) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
        """See `LocalBlock.forward`."""
        work = _Work.of(self, queries, keys, relation, scoring)
        rows = work.rows
        q, k, v = work.scaled_queries(), work.padded_keys(keys.k), work.padded_keys(keys.v)
        reachable, is_open = work.visible_tiles()
        reach = bounds(reachable, is_open)

        def attend(carry, kT, q_tile, i, j, *, masked: bool):
            numerator, maximum, denominator = carry
            product = _product(q_tile, work.column(kT, j, axis=2))
            scores, shown, keep = work.finish_scores(product, i, j, masked=masked)
            if shown is not None:
                scores = jnp.where(shown, scores, _HIDDEN)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            rescale = jnp.exp(maximum - new_maximum)
            denominator = rescale * denominator + jnp.sum(weights, axis=-1)
            if keep is not None:
                weights = jnp.where(keep, weights, 0.0)
            value = _product(weights.astype(v.dtype), work.column(v, j))
            return rescale[..., None] * numerator + value, new_maximum, denominator

        def one_row(kT, operand):
            i, limits = operand
            q_tile = work.row(q, i)
            zeros = jnp.zeros(q_tile.shape, jnp.float32)
            maxima = jnp.full(q_tile.shape[:-1], _LEAST_MAXIMUM, jnp.float32)
            step = lambda j, carry, masked: attend(carry, kT, q_tile, i, j, masked=masked)  # noqa: E731
            carry = _sweep(limits, step, work.vary(zeros, maxima, zeros[..., 0]), reach)
            numerator, maximum, denominator = carry
            seen = denominator > 0
            divisor = jnp.where(seen, denominator, 1.0)
            out = numerator / ((1.0 - scoring.dropout_rate) * divisor)[..., None]
            return kT, (out, jnp.where(seen, maximum + jnp.log(divisor), -jnp.inf))

        def every_row() -> tuple[Array, ...]:
            kT = lax.optimization_barrier(jnp.swapaxes(k, -1, -2))
            return lax.scan(one_row, kT, (jnp.arange(rows.count), work.traced(reach)))[1]

        out, lse = tie(work.unless_hidden(every_row, reachable, fill=(0.0, -jnp.inf)))
        return work.unfold_rows(out), work.unfold_rows(lse)

    def backward(
        self,
        queries: Queries,
        keys: Keys,
        cotangents: Cotangents,
        *,
        relation: Relation,
        scoring: Scoring,
        tie: Tie = untied,
    ) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B K S D"], Float32[Array, "B K S D"]]:
        """See `LocalBlock.backward`."""
        work = _Work.of(self, queries, keys, relation, scoring, cotangents)
        rows, columns = work.rows, work.columns
        q, d_out = work.scaled_queries(), work.padded_rows(cotangents.d_out)
        # Padded rows: log_sum_exp = +inf makes their weights zero.
        lse, delta = work.padded_rows(cotangents.log_sum_exp, fill=jnp.inf), work.padded_rows(cotangents.delta)
        k, v = work.padded_keys(keys.k), work.padded_keys(keys.v)
        reachable, is_open = work.visible_tiles()
        reach = bounds(reachable.swapaxes(-1, -2), is_open.swapaxes(-1, -2))
        keep_scale = 1.0 / (1.0 - scoring.dropout_rate)

        def accumulate(carry, tiles, transposed, i, j, *, masked: bool):
            dqT_tiles, dk, dv = carry
            k_tile, kT_tile, v_tile = tiles
            qT, d_outT = transposed
            rawT = _product(k_tile, work.row(qT, i, last=True))
            scoresT, shownT, keepT = work.finish_scores(rawT, i, j, masked=masked, transposed=True)
            weightsT = jnp.exp(scoresT - work.row(lse, i, last=True)[..., None, :])
            if shownT is not None:
                weightsT = jnp.where(shownT, weightsT, 0.0)
            d_weightsT = _product(v_tile, work.row(d_outT, i, last=True))
            dropped = weightsT
            if keepT is not None:
                dropped = jnp.where(keepT, keep_scale * weightsT, 0.0)
                d_weightsT = jnp.where(keepT, keep_scale * d_weightsT, 0.0)
            dv = dv + _product(dropped.astype(d_out.dtype), work.row(d_out, i))
            d_scoresT = weightsT * (d_weightsT - work.row(delta, i, last=True)[..., None, :])
            if scoring.soft_cap is not None:
                d_scoresT = d_scoresT * (1.0 - jnp.square(jnp.tanh(rawT * work.score_scale / scoring.soft_cap)))
            d_scoresT = d_scoresT.astype(q.dtype)
            dk = dk + _product(d_scoresT, work.row(q, i))
            dqT_i = lax.dynamic_index_in_dim(dqT_tiles, i, keepdims=False) + _product(kT_tile, d_scoresT)
            return lax.dynamic_update_index_in_dim(dqT_tiles, dqT_i, i, 0), dk, dv

        def one_column(carry, operand):
            dqT_tiles, transposed = carry
            j, limits = operand
            k_tile = work.column(k, j)
            tiles = (k_tile, jnp.swapaxes(k_tile, -1, -2), work.column(v, j))
            zeros = jnp.zeros(k_tile.shape, jnp.float32)
            step = lambda i, carry, masked: accumulate(carry, tiles, transposed, i, j, masked=masked)  # noqa: E731
            carry = (dqT_tiles, *work.vary(zeros, zeros))
            dqT_tiles, dk, dv = _sweep(limits, step, carry, reach)
            return (dqT_tiles, transposed), (dk, dv)

        def every_column() -> tuple[Array, ...]:
            transposed = lax.optimization_barrier((jnp.swapaxes(q, -1, -2), jnp.swapaxes(d_out, -1, -2)))
            zeros = jnp.zeros((rows.count, k.shape[0], k.shape[-1], work.G * rows.size), jnp.float32)
            carry = (work.vary(zeros)[0], transposed)
            operands = (jnp.arange(columns.count), work.traced(reach))
            (dqT, _), (dk, dv) = lax.scan(one_column, carry, operands)
            return dqT, dk, dv

        dqT, dk, dv = tie(work.unless_hidden(every_column, reachable, fill=(0.0, 0.0, 0.0)))
        dq = scoring.scale * work.unfold_rows(jnp.swapaxes(dqT, -1, -2))
        # Queries came scaled where that is exact enough; else what they left out is made up for here.
        dk = work.unfold_columns(dk if work.score_scale == 1.0 else work.score_scale * dk)
        return dq, dk, work.unfold_columns(dv)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """One rectangle, and how it is cut into tiles."""

    queries: Queries
    keys: Keys
    relation: Relation
    scoring: Scoring
    rows: Tiling
    columns: Tiling
    mask_positions: tuple[Array, Array]
    inputs: tuple[Array, ...]

    @staticmethod
    def of(block: XlaBlock, queries: Queries, keys: Keys, relation: Relation, scoring: Scoring, *more) -> "_Work":
        T, S = queries.q.shape[2], keys.k.shape[2]
        queries, keys = _tied(queries, keys)
        mask_positions = queries.positions, keys.positions
        if relation.offset is not None:
            mask_positions = _iota(T, queries.q) + relation.offset, _iota(S, queries.q)
        return _Work(
            queries=queries,
            keys=keys,
            relation=relation,
            scoring=scoring,
            rows=Tiling.of(T, block.block_size),
            columns=Tiling.of(S, block.block_size),
            mask_positions=mask_positions,
            inputs=tuple(jax.tree.leaves((queries, keys, more))),
        )

    @property
    def G(self) -> int:  # noqa: N802, a letter of the dimension key
        """Query heads that share a key-value head."""
        return self.queries.q.shape[1] // self.keys.k.shape[1]

    @property
    def score_scale(self) -> float:
        """What is left to multiply a product of queries and keys by."""
        return 1.0 if self.queries.q.dtype == jnp.float32 else self.scoring.scale

    def scaled_queries(self) -> Array:
        """[B K, G, T, D], in float32 times scale: cheaper than scaling every score, and as exact."""
        q = self.queries.q
        return self.padded_rows(q * self.scoring.scale if q.dtype == jnp.float32 else q)

    def padded_rows(self, x: Array, *, fill: float = 0.0) -> Array:
        """[B, H, T, ...] as [B K, G, T, ...] with all tiles whole."""
        return _pad(x.reshape(-1, self.G, *x.shape[2:]), 2, self.rows.padding, fill)

    def padded_keys(self, x: Array) -> Array:
        """[B, K, S, D] as [B K, S, D] with all tiles whole."""
        return _pad(x.reshape(-1, *x.shape[2:]), 1, self.columns.padding, 0.0)

    def row(self, x: Array, i: Array, *, last: bool = False) -> Array:
        """Tile i of [B K, G, T, D] as [B K, G * size, D]; with `last`, of [B K, G, ..., T] with the G * size last."""
        size = self.rows.size
        if not last:
            return lax.dynamic_slice_in_dim(x, i * size, size, 2).reshape(x.shape[0], -1, x.shape[-1])
        tile = lax.dynamic_slice_in_dim(x, i * size, size, x.ndim - 1)
        return jnp.moveaxis(tile, 1, -2).reshape(x.shape[0], *x.shape[2:-1], -1)

    def column(self, x: Array, j: Array, *, axis: int = 1) -> Array:
        """Tile j of the keys' side."""
        return lax.dynamic_slice_in_dim(x, j * self.columns.size, self.columns.size, axis)

    def unfold_rows(self, x: Array) -> Array:
        """[tiles, B K, G * size, ...] as [B, H, T, ...]."""
        B, H, T = self.queries.q.shape[:3]
        x = x.reshape(*x.shape[:2], self.G, self.rows.size, *x.shape[3:])
        return jnp.moveaxis(x, 0, 2).reshape(B, H, -1, *x.shape[4:])[:, :, :T]

    def unfold_columns(self, x: Array) -> Array:
        """[tiles, B K, size, D] as [B, K, S, D]."""
        B, K, S, D = self.keys.k.shape
        return jnp.moveaxis(x, 0, 1).reshape(B, K, -1, D)[:, :, :S]

    def vary(self, *arrays: Array) -> tuple[Array, ...]:
        """The arrays, marked as varying over every mesh axis that the block's inputs vary over."""
        return vary_alike(*arrays, *self.inputs)[: len(arrays)]

    def traced(self, reach: Bounds) -> Bounds:
        """Bounds that a loop can go over."""
        return Bounds(*self.vary(*map(jnp.asarray, reach)))

    def visible_tiles(self) -> tuple[Array | np.ndarray, Array | np.ndarray]:
        """Which tiles are reachable and which open, to any and to all rows of the batch."""
        reachable, is_open = visible_tiles(
            self.queries, self.keys, relation=self.relation, rows=self.rows, columns=self.columns
        )
        # Known now they are of numpy and of no row in particular.
        if isinstance(reachable, Array):
            reachable = reachable.reshape(-1, *reachable.shape[-2:]).any(axis=0)
        if isinstance(is_open, Array):
            is_open = is_open.reshape(-1, *is_open.shape[-2:]).all(axis=0)
        return reachable, is_open

    def unless_hidden(self, compute, reachable: Array | np.ndarray, *, fill: tuple[float, ...]) -> tuple[Array, ...]:
        """`compute()`, or `fill` for its results where the running program finds that no tile is reachable."""
        if isinstance(reachable, np.ndarray):
            return compute()

        def nothing() -> tuple[Array, ...]:
            shapes = jax.eval_shape(compute)
            return tuple(self.vary(jnp.full(x.shape, value, x.dtype))[0] for x, value in zip(shapes, fill, strict=True))

        return lax.cond(self.vary(jnp.any(reachable))[0], compute, nothing)

    def finish_scores(self, product: Array, i, j, *, masked: bool, transposed: bool = False):
        """(logits, what is shown or None, what dropout keeps or None) of tile (i, j), from q·k."""
        scoring, queries, keys = self.scoring, self.queries, self.keys
        orient = (lambda x: jnp.swapaxes(x, -1, -2)) if transposed else (lambda x: x)
        scores = product if self.score_scale == 1.0 else self.score_scale * product
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
        if queries.slopes is not None:
            p, s = self._of_row(queries.positions, i), self._of_column(keys.positions, j)
            distance = jnp.abs(p[..., :, None] - s[..., None, :]).astype(jnp.float32)
            slopes = queries.slopes.reshape(-1, self.keys.k.shape[1], self.G)
            bias = orient(jnp.repeat(slopes, self.rows.size, axis=-1)[..., None] * distance)
            scores = scores - self._for_each_head(bias)
        shown = None
        if masked:
            shown = visible(
                self.relation.mask,
                self._of_row(self.mask_positions[0], i),
                self._of_column(self.mask_positions[1], j),
                None if queries.segment_ids is None else self._of_row(queries.segment_ids, i),
                None if keys.segment_ids is None else self._of_column(keys.segment_ids, j),
            )
            if self.columns.padding:
                index = j * self.columns.size + _iota(self.columns.size, queries.q)
                shown = shown & (index < keys.k.shape[2])
            shown = self._for_each_head(orient(shown))
        keep = None
        if queries.row_bits is not None:
            bits = self.row(self.padded_rows(queries.row_bits, fill=0), i, last=True)
            s = self._for_each_head(self._of_column(keys.positions, j))
            keep = orient(kept(bits[..., :, None], s[..., None, :], scoring.dropout_rate))
        return scores, shown, keep

    def _for_each_head(self, x: Array) -> Array:
        """[b, 1 or K, ...] as [B K, ...], or as [1, ...] where all heads of all rows share it."""
        if x.shape[:2] == (1, 1):
            return x[0]
        B, K = self.keys.k.shape[:2]
        return jnp.broadcast_to(x, (B, K, *x.shape[2:])).reshape(B * K, *x.shape[2:])

    def _of_row(self, x: Array, i) -> Array:
        """Tile i of [b, T] as [b, 1, G * size]."""
        x = jnp.pad(x, ((0, 0), (0, self.rows.padding)), mode="edge")
        return jnp.tile(lax.dynamic_slice_in_dim(x, i * self.rows.size, self.rows.size, 1)[:, None], self.G)

    def _of_column(self, x: Array, j) -> Array:
        """Tile j of [b, S] as [b, 1, size]."""
        x = jnp.pad(x, ((0, 0), (0, self.columns.padding)), mode="edge")
        return self.column(x, j)[:, None]


def _product(a: Array, b: Array) -> Array:
    """Batched a @ b."""
    return float32_einsum("nij,njl->nil", a, b)


def _pad(x: Array, axis: int, padding: int, value: float) -> Array:
    if padding == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padding)
    return jnp.pad(x, widths, constant_values=value)


def _sweep(limits: Bounds, step, carry, reach: Bounds):
    """`carry` after every reachable tile of a row: masked ones, open ones, masked ones; `reach` is all rows' limits."""
    stretches = (("first", "open_first", True), ("open_first", "open_stop", False), ("open_stop", "stop", True))
    for start, stop, masked in stretches:
        # A loop that never runs would be compiled all the same.
        if not reach.known_equal(start, stop):
            begin, end = getattr(limits, start), getattr(limits, stop)
            carry = lax.fori_loop(begin, end, lambda j, carry, masked=masked: step(j, carry, masked), carry)
    return carry


def _tied(queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
    """Both, with positions and segment ids made to depend on the data.

    Differentiating a scan over layers hoists whatever does not depend on its carry and stores it for every iteration
    of every loop inside: a mask made of constants would be kept, as bool and as float32, for every tile of every
    layer, which is quadratic memory. Depending on the data keeps it where it is used.
    """
    anchor = queries.q.ravel()[0]
    tie = lambda x: None if x is None else lax.optimization_barrier((x, anchor))[0]  # noqa: E731
    return (
        queries._replace(
            positions=tie(queries.positions),
            segment_ids=tie(queries.segment_ids),
            slopes=tie(queries.slopes),
            row_bits=tie(queries.row_bits),
        ),
        keys._replace(positions=tie(keys.positions), segment_ids=tie(keys.segment_ids)),
    )


def _iota(size: int, anchor: Array) -> Array:
    """[[0, ..., size - 1]], made to depend on `anchor`; see `_tied`."""
    return lax.optimization_barrier((lax.iota(jnp.int32, size), anchor.ravel()[0]))[0][None]
