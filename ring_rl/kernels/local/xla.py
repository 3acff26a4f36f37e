"""The local block in plain XLA: tiles of queries against tiles of keys, online softmax between them.

Runs on every platform; on a CPU it is the fast one. There the operand order of a matrix product decides its
speed, so every product below is a plain row-by-column one: keys are stored transposed once, and the backward
works on transposed scores, so that nothing contracts the row index of a large operand.

The query heads of a group are folded into the rows of a tile, [G * tile, D], so that keys and values of
grouped-query attention are never repeated.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.accumulate import float32_einsum
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Bool, Float, Float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaBlock:
    """Blockwise attention, O(T S D) work and O(T D) memory beyond one tile of scores a head.

    Attributes:
        block_size: Largest edge of a tile, in tokens. Lengths need not be multiples of it.
    """

    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {self.block_size}")

    def forward(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Float32[Array, "B T H D"], Float32[Array, "B H T"]]:
        """See `LocalBlock.forward`."""
        q, k, v = vary_alike(q, k, v)
        (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
        rows, columns = _Tiling.of(T, self.block_size), _Tiling.of(S, self.block_size)
        q_tiles = _fold_queries(q, K, rows)
        kT_tiles = jnp.swapaxes(_fold_keys(k, columns), -1, -2)
        v_tiles = _fold_keys(v, columns)
        G = H // K
        # The last tile of a row of tiles is the only one that may hold keys to hide: the diagonal, or padding.
        masked = causal or columns.padding > 0

        def attend(carry, q_tile, j, mask_TS=None):
            numerator, maximum, denominator = carry
            scores = scale * _product(q_tile, lax.dynamic_index_in_dim(kT_tiles, j, keepdims=False))
            if mask_TS is not None:
                scores = _hide(scores, mask_TS, G)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            kept = jnp.exp(maximum - new_maximum)
            value = _product(weights.astype(v.dtype), lax.dynamic_index_in_dim(v_tiles, j, keepdims=False))
            return (
                kept[..., None] * numerator + value,
                new_maximum,
                kept * denominator + jnp.sum(weights, axis=-1),
            )

        def one_row_of_tiles(_, operand):
            i, q_tile = operand
            zeros = jnp.zeros(q_tile.shape, jnp.float32)
            # Finite, so that the first rescaling is exp(-huge) = 0 and never exp(-inf + inf).
            carry = vary_alike(zeros, jnp.full(q_tile.shape[:-1], _LOWEST), zeros[..., 0], q_tile)[:3]
            last = i if causal else columns.count - 1
            plain = last if masked else columns.count
            carry = lax.fori_loop(0, plain, lambda j, c: attend(c, q_tile, j), carry)
            if masked:
                mask_TS = _causal_mask(rows.size, q_tile) if causal else _padding_mask(columns, q_tile)
                carry = attend(carry, q_tile, last, mask_TS)
            numerator, maximum, denominator = carry
            return None, (numerator / denominator[..., None], maximum + jnp.log(denominator))

        _, (out_tiles, lse_tiles) = lax.scan(one_row_of_tiles, None, (jnp.arange(rows.count), q_tiles))
        return _unfold_queries(out_tiles, rows, (B, T, H, D)), _unfold_rows(lse_tiles, rows, (B, H, T))

    def backward(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        *,
        out: Float[Array, "B T H D"],
        log_sum_exp: Float32[Array, "B H T"],
        d_out: Float[Array, "B T H D"],
        delta: Float32[Array, "B H T"],
        causal: bool,
        scale: float,
    ) -> tuple[Float32[Array, "B T H D"], Float32[Array, "B S K D"], Float32[Array, "B S K D"]]:
        """See `LocalBlock.backward`."""
        del out  # enters through delta alone
        q, k, v, log_sum_exp, d_out, delta = vary_alike(q, k, v, log_sum_exp, d_out, delta)
        (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
        rows, columns = _Tiling.of(T, self.block_size), _Tiling.of(S, self.block_size)
        q_tiles, d_out_tiles = _fold_queries(q, K, rows), _fold_queries(d_out, K, rows)
        qT_tiles, d_outT_tiles = jnp.swapaxes(q_tiles, -1, -2), jnp.swapaxes(d_out_tiles, -1, -2)
        # Padded rows: log_sum_exp = +inf makes their weights zero.
        lse_tiles = _fold_rows(log_sum_exp, K, rows, fill=jnp.inf)
        delta_tiles = _fold_rows(delta, K, rows, fill=0.0)
        k_tiles, v_tiles = _fold_keys(k, columns), _fold_keys(v, columns)
        G = H // K

        def accumulate(carry, tiles, i, mask_ST=None):
            dqT_tiles, dk, dv = carry
            k_tile, kT_tile, v_tile = tiles
            at_i = lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
            scoresT = scale * _product(k_tile, at_i(qT_tiles)) - at_i(lse_tiles)[..., None, :]
            # A weight is at most 1. Only padded keys, whose weights meet zero keys, could exceed it and overflow.
            weightsT = jnp.exp(jnp.minimum(scoresT, 0.0))
            if mask_ST is not None:
                weightsT = _hide(weightsT, mask_ST, G, queries_last=True, value=0.0)
            dv = dv + _product(weightsT.astype(d_out.dtype), at_i(d_out_tiles))
            d_weightsT = _product(v_tile, at_i(d_outT_tiles))
            d_scoresT = (weightsT * (d_weightsT - at_i(delta_tiles)[..., None, :])).astype(q.dtype)
            dk = dk + _product(d_scoresT, at_i(q_tiles))
            dqT_i = at_i(dqT_tiles) + _product(kT_tile, d_scoresT)
            return lax.dynamic_update_index_in_dim(dqT_tiles, dqT_i, i, 0), dk, dv

        def one_column_of_tiles(dqT_tiles, operand):
            j, k_tile, v_tile = operand
            tiles = (k_tile, jnp.swapaxes(k_tile, -1, -2), v_tile)
            zeros = jnp.zeros(k_tile.shape, jnp.float32)
            carry = (dqT_tiles, *vary_alike(zeros, zeros, k_tile)[:2])
            if causal:
                carry = accumulate(carry, tiles, j, _causal_mask(rows.size, k_tile).T)
            first = j + 1 if causal else 0
            dqT_tiles, dk, dv = lax.fori_loop(first, rows.count, lambda i, c: accumulate(c, tiles, i), carry)
            return dqT_tiles, (dk, dv)

        zeros = vary_alike(jnp.zeros(qT_tiles.shape, jnp.float32), q)[0]
        dqT_tiles, (dk_tiles, dv_tiles) = lax.scan(
            one_column_of_tiles, zeros, (jnp.arange(columns.count), k_tiles, v_tiles)
        )
        dq = scale * _unfold_queries(jnp.swapaxes(dqT_tiles, -1, -2), rows, (B, T, H, D))
        dk = scale * _unfold_keys(dk_tiles, columns, S)
        return dq, dk, _unfold_keys(dv_tiles, columns, S)


_LOWEST = jnp.finfo(jnp.float32).min


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """`count` tiles of `size` tokens, the last one with `padding` tokens that do not exist."""

    count: int
    size: int
    padding: int

    @staticmethod
    def of(length: int, block_size: int) -> "_Tiling":
        count = -(-length // block_size)
        size = -(-length // count)
        return _Tiling(count, size, count * size - length)


def _product(a: Array, b: Array) -> Array:
    """Batched a @ b over leading axes [B, K]."""
    return float32_einsum("bkij,bkjl->bkil", a, b)


def _pad(x: Array, axis: int, padding: int, value: float = 0.0) -> Array:
    if padding == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padding)
    return jnp.pad(x, widths, constant_values=value)


def _fold_queries(x_BTHD: Array, K: int, tiling: _Tiling) -> Array:
    """[B, T, H, D] -> [count, B, K, G * size, D]."""
    B, _, H, D = x_BTHD.shape
    x = _pad(x_BTHD, 1, tiling.padding).reshape(B, tiling.count, tiling.size, K, H // K, D)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(tiling.count, B, K, -1, D)


def _unfold_queries(x: Array, tiling: _Tiling, shape: tuple[int, int, int, int]) -> Array:
    B, T, H, D = shape
    K = x.shape[2]
    x = x.reshape(tiling.count, B, K, H // K, tiling.size, D).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, H, D)[:, :T]


def _fold_rows(x_BHT: Array, K: int, tiling: _Tiling, *, fill: float) -> Array:
    """[B, H, T] -> [count, B, K, G * size]."""
    B, H, _ = x_BHT.shape
    x = _pad(x_BHT, 2, tiling.padding, fill).reshape(B, K, H // K, tiling.count, tiling.size)
    return x.transpose(3, 0, 1, 2, 4).reshape(tiling.count, B, K, -1)


def _unfold_rows(x: Array, tiling: _Tiling, shape: tuple[int, int, int]) -> Array:
    B, H, T = shape
    K = x.shape[2]
    x = x.reshape(tiling.count, B, K, H // K, tiling.size).transpose(1, 2, 3, 0, 4)
    return x.reshape(B, H, -1)[:, :, :T]


def _fold_keys(x_BSKD: Array, tiling: _Tiling) -> Array:
    """[B, S, K, D] -> [count, B, K, size, D]."""
    B, _, K, D = x_BSKD.shape
    x = _pad(x_BSKD, 1, tiling.padding).reshape(B, tiling.count, tiling.size, K, D)
    return x.transpose(1, 0, 3, 2, 4)


def _unfold_keys(x: Array, tiling: _Tiling, length: int) -> Array:
    count, B, K, size, D = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, count * size, K, D)[:, :length]


def _hide(scores: Array, mask: Bool[Array, "a b"], G: int, *, queries_last=False, value=_LOWEST) -> Array:
    """`scores` with what `mask` does not show set to `value`, the G heads of a group sharing one mask."""
    B, K, rows, columns = scores.shape
    shape = (B, K, rows, G, columns // G) if queries_last else (B, K, G, rows // G, columns)
    shown = mask[:, None, :] if queries_last else mask
    return jnp.where(shown, scores.reshape(shape), value).reshape(scores.shape)


def _tied_iota(size: int, anchor: Array) -> Array:
    """0..size-1, made to depend on `anchor`.

    Differentiating a scan over layers hoists whatever does not depend on its carry and stores it for every
    iteration of every loop inside: a mask made of constants would be kept, as bool and as float32, for every
    tile of every layer, which is quadratic memory. Depending on the data keeps it where it is used.
    """
    return lax.optimization_barrier((lax.iota(jnp.int32, size), anchor.ravel()[0]))[0]


def _causal_mask(size: int, anchor: Array) -> Bool[Array, "T S"]:
    iota = _tied_iota(size, anchor)
    return iota[:, None] >= iota[None, :]


def _padding_mask(columns: _Tiling, anchor: Array) -> Bool[Array, "1 S"]:
    return (_tied_iota(columns.size, anchor) < columns.size - columns.padding)[None, :]
