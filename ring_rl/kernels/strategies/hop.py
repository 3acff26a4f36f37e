"""One hop of a ring: what a device's queries and a visiting shard of keys have to do with each other.

Without a mask by position: everything. Otherwise it depends on the layout.

Causal and zigzag, with 2R chunks: device i holds chunks i (early) and 2R-1-i (late), the visitor from j != i brings
chunks j and 2R-1-j. Of the four pairs

    (late q, early k)   always visible in full, since 2R-1-i > j
    (early q, late k)   never visible, since i < 2R-1-j
    (early q, early k)  visible in full if j < i, else not at all
    (late q, late k)    visible in full if j > i, else not at all

exactly two are visible, each in full. Which one the second is depends on the device, so a `where` picks its
operands: the same two unmasked blocks on every device at every hop. No branch, no mask, no wasted tile. The two go
to the local block as one call of twice the batch. Segments only ever hide more, within the two.

Causal and contiguous ("earlier"): everything if the shard is earlier, else nothing.

Anything else ("by_position"): the block sees the positions and skips the tiles that nobody sees.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ring_rl.kernels.local.block import EVERYTHING, Relation
from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.online_softmax import Partial, merge, where_seen
from ring_rl.kernels.strategies.plan import Plan
from ring_rl.kernels.tokens import Cotangents, Keys, Queries, select, stack_batches
from ring_rl.typing import Array, Float32

Gradients = tuple[Float32[Array, "B H T D"], Float32[Array, "B K S D"], Float32[Array, "B K S D"]]


def forward(
    plan: Plan, state: Partial, queries: Queries, visitor: Keys, *, earlier: Array, tie: Tie = untied
) -> Partial:
    """`state` extended by a visiting shard; `earlier` says whether it comes from a device with a smaller index."""
    kind = plan.hop_kind(queries.q.shape[2])
    if kind == "zigzag":
        return _zigzag_forward(plan, state, queries, visitor, earlier, tie)
    relation = Relation(plan.mask) if kind == "by_position" else EVERYTHING
    out, log_sum_exp = plan.local.forward(queries, visitor, relation=relation, scoring=plan.scoring, tie=tie)
    if kind == "earlier":
        # Devices run in lockstep and the last one needs every block, so skipping would save no time on a real ring.
        out, log_sum_exp = jnp.where(earlier, out, 0.0), where_seen(earlier, log_sum_exp)
    return merge(state, out, log_sum_exp)


def backward(
    plan: Plan, queries: Queries, visitor: Keys, cotangents: Cotangents, *, earlier: Array, tie: Tie = untied
) -> Gradients:
    """(dq, dk, dv) of `forward`, float32."""
    kind = plan.hop_kind(queries.q.shape[2])
    if kind == "zigzag":
        return _zigzag_backward(plan, queries, visitor, cotangents, earlier, tie)
    if kind == "earlier":
        # +inf silences the rows that see nothing.
        cotangents = cotangents._replace(log_sum_exp=jnp.where(earlier, cotangents.log_sum_exp, jnp.inf))
    relation = Relation(plan.mask) if kind == "by_position" else EVERYTHING
    return plan.local.backward(queries, visitor, cotangents, relation=relation, scoring=plan.scoring, tie=tie)


def _zigzag_forward(plan: Plan, state: Partial, queries: Queries, visitor: Keys, earlier: Array, tie: Tie) -> Partial:
    c = queries.q.shape[2] // 2
    out, log_sum_exp = plan.local.forward(
        *_two_visible_pairs(queries, visitor, earlier), relation=EVERYTHING, scoring=plan.scoring, tie=tie
    )
    (out_1, out_2), (lse_1, lse_2) = _unpair(out), _unpair(log_sum_exp)
    early = Partial(state.numerator[:, :, :c], state.maximum[:, :, :c], state.denominator[:, :, :c])
    late = Partial(state.numerator[:, :, c:], state.maximum[:, :, c:], state.denominator[:, :, c:])
    early = merge(early, out_2, where_seen(earlier, lse_2))
    late = merge(merge(late, out_1, lse_1), out_2, where_seen(~earlier, lse_2))
    return Partial(
        jnp.concatenate([early.numerator, late.numerator], axis=2),
        jnp.concatenate([early.maximum, late.maximum], axis=2),
        jnp.concatenate([early.denominator, late.denominator], axis=2),
    )


def _zigzag_backward(
    plan: Plan, queries: Queries, visitor: Keys, cotangents: Cotangents, earlier: Array, tie: Tie
) -> Gradients:
    dq, dk, dv = plan.local.backward(
        *_two_visible_pairs(queries, visitor, earlier),
        _late_and(earlier, cotangents),
        relation=EVERYTHING,
        scoring=plan.scoring,
        tie=tie,
    )
    (dq_1, dq_2), (dk_1, dk_2), (dv_1, dv_2) = _unpair(dq), _unpair(dk), _unpair(dv)
    if_early, if_late = (lambda x: jnp.where(earlier, x, 0.0)), (lambda x: jnp.where(earlier, 0.0, x))
    return (
        jnp.concatenate([if_early(dq_2), dq_1 + if_late(dq_2)], axis=2),
        jnp.concatenate([dk_1 + if_early(dk_2), if_late(dk_2)], axis=2),
        jnp.concatenate([dv_1 + if_early(dv_2), if_late(dv_2)], axis=2),
    )


def _two_visible_pairs(queries: Queries, visitor: Keys, earlier: Array) -> tuple[Queries, Keys]:
    S = visitor.k.shape[2]
    early, late = visitor.between(0, S // 2), visitor.between(S // 2, S)
    return _late_and(earlier, queries), stack_batches(early, select(earlier, early, late))


def _late_and(earlier: Array, stretch):
    """The late half, and with it the early one if `earlier`, else the late one again."""
    T = stretch[0].shape[2]
    early, late = stretch.between(0, T // 2), stretch.between(T // 2, T)
    return stack_batches(late, select(earlier, early, late))


class Rectangle(NamedTuple):
    """Queries [query_start, query_stop) against keys [key_start, key_stop) of a device's own shard."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    relation: Relation


def own_block_parts(plan: Plan, length: int) -> tuple[list[Rectangle], list[Rectangle]]:
    """A device's own block cut into two parts of about equal work, disjoint and together complete."""
    half, relation = length // 2, plan.own_relation(length)
    mask = relation.mask
    if relation.offset == 0 and mask.causal and mask.window is None and half % mask.causal_block_size == 0:
        first = [Rectangle(0, half, 0, half, relation), Rectangle(half, length, half, length, relation)]
        second = [Rectangle(half, length, 0, half, EVERYTHING)]
    else:
        shifted = relation if relation.offset is None else Relation(mask, relation.offset + half)
        first = [Rectangle(half, length, 0, length, shifted)]
        second = [Rectangle(0, half, 0, length, relation)]
    nonempty = lambda part: [r for r in part if r.query_start < r.query_stop and r.key_start < r.key_stop]  # noqa: E731
    return nonempty(first), nonempty(second)


def own_block_backward(
    plan: Plan, queries: Queries, own: Keys, cotangents: Cotangents, *, parts: list[Rectangle], tie: Tie = untied
) -> Gradients:
    """(dq, dk, dv) of some rectangles of a device's own block; `tie` ties the last of them."""
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (queries.q, own.k, own.v))
    for part in parts:
        rows, columns = slice(part.query_start, part.query_stop), slice(part.key_start, part.key_stop)
        dq_part, dk_part, dv_part = plan.local.backward(
            queries.between(part.query_start, part.query_stop),
            own.between(part.key_start, part.key_stop),
            cotangents.between(part.query_start, part.query_stop),
            relation=part.relation,
            scoring=plan.scoring,
            tie=tie if part is parts[-1] else untied,
        )
        dq = dq.at[:, :, rows].add(dq_part)
        dk = dk.at[:, :, columns].add(dk_part)
        dv = dv.at[:, :, columns].add(dv_part)
    return dq, dk, dv


def _unpair(x: Array) -> tuple[Array, Array]:
    half = x.shape[0] // 2
    return x[:half], x[half:]
