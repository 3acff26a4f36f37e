"""One hop of a ring: what a device's queries and a visiting shard of keys have to do with each other.

Full attention: everything. Causal and contiguous: everything if the shard is earlier, else nothing.

Causal and zigzag, with 2R chunks: device i holds chunks i (early) and 2R-1-i (late), the visitor from j != i
brings chunks j and 2R-1-j. Of the four pairs

    (late q, early k)   always visible in full, since 2R-1-i > j
    (early q, late k)   never visible, since i < 2R-1-j
    (early q, early k)  visible in full if j < i, else not at all
    (late q, late k)    visible in full if j > i, else not at all

exactly two are visible, each in full. Which one the second is depends on the device, so a `where` picks its
operands: the same two unmasked blocks on every device at every hop. No branch, no mask, no wasted tile.
The two go to the local block as one call of twice the batch.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ring_rl.kernels.local.block import LocalBlock
from ring_rl.kernels.online_softmax import Partial, merge, where_seen
from ring_rl.typing import Array, Float, Float32


class Queries(NamedTuple):
    """What a backward block needs of the queries' side; all global results."""

    q: Float[Array, "B T H D"]
    out: Float[Array, "B T H D"]
    log_sum_exp: Float32[Array, "B H T"]
    d_out: Float[Array, "B T H D"]
    delta: Float32[Array, "B H T"]

    def rows(self, start: int, stop: int) -> "Queries":
        """The queries `start` to `stop`."""
        return Queries(
            self.q[:, start:stop],
            self.out[:, start:stop],
            self.log_sum_exp[:, :, start:stop],
            self.d_out[:, start:stop],
            self.delta[:, :, start:stop],
        )


def full_forward(state, q, k, v, *, earlier, local: LocalBlock, scale: float) -> Partial:
    """Every query sees every visiting key."""
    del earlier
    return merge(state, *local.forward(q, k, v, causal=False, scale=scale))


def full_backward(queries: Queries, k, v, *, earlier, local: LocalBlock, scale: float):
    """(dq, dk, dv) of `full_forward`."""
    del earlier
    return _backward_block(local, queries, k, v, causal=False, scale=scale)


def contiguous_forward(state, q, k, v, *, earlier, local: LocalBlock, scale: float) -> Partial:
    """Every query sees every visiting key if the shard is earlier; else the block is thrown away.

    Devices run in lockstep and the last one needs every block, so skipping would save no time on a real ring.
    """
    out, log_sum_exp = local.forward(q, k, v, causal=False, scale=scale)
    return merge(state, jnp.where(earlier, out, 0.0), where_seen(earlier, log_sum_exp))


def contiguous_backward(queries: Queries, k, v, *, earlier, local: LocalBlock, scale: float):
    """(dq, dk, dv) of `contiguous_forward`: log_sum_exp = +inf silences the rows that see nothing."""
    queries = queries._replace(log_sum_exp=jnp.where(earlier, queries.log_sum_exp, jnp.inf))
    return _backward_block(local, queries, k, v, causal=False, scale=scale)


def zigzag_forward(state, q, k, v, *, earlier, local: LocalBlock, scale: float) -> Partial:
    """The two visible blocks of a causal zigzag hop, merged into the rows they belong to."""
    c = q.shape[1] // 2
    q_early, q_late, k_early, k_late, v_early, v_late = (*_halves(q), *_halves(k), *_halves(v))
    out, log_sum_exp = local.forward(
        _both(q_late, jnp.where(earlier, q_early, q_late)),
        _both(k_early, jnp.where(earlier, k_early, k_late)),
        _both(v_early, jnp.where(earlier, v_early, v_late)),
        causal=False,
        scale=scale,
    )
    (out_1, out_2), (lse_1, lse_2) = _unpair(out), _unpair(log_sum_exp)
    early = Partial(state.numerator[:, :c], state.maximum[:, :, :c], state.denominator[:, :, :c])
    late = Partial(state.numerator[:, c:], state.maximum[:, :, c:], state.denominator[:, :, c:])
    early = merge(early, out_2, where_seen(earlier, lse_2))
    late = merge(merge(late, out_1, lse_1), out_2, where_seen(~earlier, lse_2))
    return Partial(
        jnp.concatenate([early.numerator, late.numerator], axis=1),
        jnp.concatenate([early.maximum, late.maximum], axis=2),
        jnp.concatenate([early.denominator, late.denominator], axis=2),
    )


def zigzag_backward(queries: Queries, k, v, *, earlier, local: LocalBlock, scale: float):
    """(dq, dk, dv) of `zigzag_forward`, from the same two blocks."""
    T = k.shape[1]
    early, late = queries.rows(0, T // 2), queries.rows(T // 2, T)
    k_early, k_late, v_early, v_late = (*_halves(k), *_halves(v))
    paired = Queries(
        *(_both(b, jnp.where(earlier, a, b)) for a, b in zip(early, late, strict=True)),
    )
    dq, dk, dv = _backward_block(
        local,
        paired,
        _both(k_early, jnp.where(earlier, k_early, k_late)),
        _both(v_early, jnp.where(earlier, v_early, v_late)),
        causal=False,
        scale=scale,
    )
    (dq_1, dq_2), (dk_1, dk_2), (dv_1, dv_2) = _unpair(dq), _unpair(dk), _unpair(dv)
    if_early, if_late = (lambda x: jnp.where(earlier, x, 0.0)), (lambda x: jnp.where(earlier, 0.0, x))
    return (
        jnp.concatenate([if_early(dq_2), dq_1 + if_late(dq_2)], axis=1),
        jnp.concatenate([dk_1 + if_early(dk_2), if_late(dk_2)], axis=1),
        jnp.concatenate([dv_1 + if_early(dv_2), if_late(dv_2)], axis=1),
    )


class Rectangle(NamedTuple):
    """Queries [query_start, query_stop) against keys [key_start, key_stop) of a device's own shard."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    causal: bool


def own_block_parts(length: int, *, causal: bool) -> tuple[list[Rectangle], list[Rectangle]]:
    """A device's own block cut into two parts of equal work, disjoint and together complete."""
    half = length // 2
    if causal:
        diagonals = [Rectangle(0, half, 0, half, True), Rectangle(half, length, half, length, True)]
        first, second = diagonals, [Rectangle(half, length, 0, half, False)]
    else:
        first = [Rectangle(half, length, 0, length, False)]
        second = [Rectangle(0, half, 0, length, False)]
    nonempty = lambda part: [r for r in part if r.query_start < r.query_stop and r.key_start < r.key_stop]  # noqa: E731
    return nonempty(first), nonempty(second)


def own_block_backward(queries: Queries, k, v, *, parts: list[Rectangle], local: LocalBlock, scale: float):
    """(dq, dk, dv) of some rectangles of a device's own block."""
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (queries.q, k, v))
    for part in parts:
        rows, columns = slice(part.query_start, part.query_stop), slice(part.key_start, part.key_stop)
        dq_part, dk_part, dv_part = _backward_block(
            local,
            queries.rows(part.query_start, part.query_stop),
            k[:, columns],
            v[:, columns],
            causal=part.causal,
            scale=scale,
        )
        dq = dq.at[:, rows].add(dq_part)
        dk = dk.at[:, columns].add(dk_part)
        dv = dv.at[:, columns].add(dv_part)
    return dq, dk, dv


def _backward_block(local: LocalBlock, queries: Queries, k, v, *, causal: bool, scale: float):
    return local.backward(
        queries.q,
        k,
        v,
        out=queries.out,
        log_sum_exp=queries.log_sum_exp,
        d_out=queries.d_out,
        delta=queries.delta,
        causal=causal,
        scale=scale,
    )


def _halves(x: Array) -> tuple[Array, Array]:
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def _both(first: Array, second: Array) -> Array:
    return jnp.concatenate([first, second], axis=0)


def _unpair(x: Array) -> tuple[Array, Array]:
    half = x.shape[0] // 2
    return x[:half], x[half:]
