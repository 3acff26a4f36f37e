"""All-gather attention: every device gets all keys and values at once, then computes its queries' share.

The same rectangles as in a ring, in the same order, so every mask, layout and local block serves; only that shard j
is looked up instead of passed on. One transfer to wait for instead of R - 1, and R shards in memory instead of two.
Backward gathers again rather than keep them, and scatters the sums of dk and dv in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.online_softmax import Partial, begin, finish
from ring_rl.kernels.strategies import hop as hops
from ring_rl.kernels.strategies.plan import Held, Plan, Side
from ring_rl.kernels.strategies.ring import axis_is_bound, repeat, sender, sender_is_earlier
from ring_rl.kernels.tokens import Cotangents
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array


def forward(plan: Plan, q: Array, k: Array, v: Array, side: Side) -> tuple[Array, Array]:
    """(out, log_sum_exp), float32; 2 (R-1) T K D elements received a device and all 2 R T K D held."""
    queries, own = plan.queries(q, side), Held.of(k, v, side)
    gathered = _gather(plan, own)

    def hop(state: Partial, t: Array | int) -> Partial:
        j = sender(plan, t)
        visitor = plan.keys(_shard(gathered, j), j)
        return hops.forward(plan, state, queries, visitor, earlier=sender_is_earlier(plan, t))

    relation = plan.own_relation(q.shape[2])
    state = begin(*plan.local.forward(queries, plan.keys(own, plan.index), relation=relation, scoring=plan.scoring))
    return finish(repeat(plan, hop, state, 1, plan.size))


def backward(plan: Plan, q: Array, k: Array, v: Array, side: Side, cotangents: Cotangents) -> hops.Gradients:
    """(dq, dk, dv), float32; gathers again and reduces 2 R T K D float32 elements."""
    queries, own = plan.queries(q, side), Held.of(k, v, side)
    gathered = _gather(plan, own)
    first_part, second_part = hops.own_block_parts(plan, q.shape[2])
    dq, dk_own, dv_own = hops.own_block_backward(
        plan, queries, plan.keys(own, plan.index), cotangents, parts=first_part + second_part
    )

    def hop(carry, t: Array | int):
        dq, sums = carry
        j = sender(plan, t)
        visitor = plan.keys(_shard(gathered, j), j)
        dq_hop, dk, dv = hops.backward(plan, queries, visitor, cotangents, earlier=sender_is_earlier(plan, t))
        return dq + dq_hop, lax.dynamic_update_index_in_dim(sums, jnp.stack([dk, dv]), j, 0)

    zeros = vary_alike(jnp.zeros((plan.size, 2, *k.shape), jnp.float32), dq)[0]
    dq, sums = repeat(plan, hop, (dq, zeros), 1, plan.size)
    dk, dv = _reduce_scatter(plan, sums)
    return dq, dk_own + dk, dv_own + dv


def _gather(plan: Plan, held: Held) -> Held:
    """Every device's shard, along a new first axis."""
    if axis_is_bound(plan):
        return jax.tree.map(lambda x: lax.all_gather(x, plan.axis_name, axis=0), held)

    def by_permutes(x: Array) -> Array:
        gathered = jnp.zeros((plan.size, *x.shape), x.dtype)
        for t in range(plan.size):
            gathered = lax.dynamic_update_index_in_dim(gathered, plan.send(x, by=t), sender(plan, t), 0)
        return gathered

    return jax.tree.map(by_permutes, held)


def _reduce_scatter(plan: Plan, sums: Array) -> Array:
    """The sum over devices of what each has for this one."""
    if axis_is_bound(plan):
        return lax.psum_scatter(sums, plan.axis_name, scatter_dimension=0, tiled=False)
    parts = [
        plan.send(lax.dynamic_index_in_dim(sums, (plan.index + t) % plan.size, keepdims=False), by=t)
        for t in range(plan.size)
    ]
    return functools.reduce(jnp.add, parts)


def _shard(gathered: Held, device: Array) -> Held:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, device, keepdims=False), gathered)
