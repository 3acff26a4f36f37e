"""Attention over shards of one sequence, and its derivative: one `custom_vjp` around a whole strategy.

It saves q, k, v, out and log_sum_exp and nothing else: O(T) memory a device for its T tokens, whatever the strategy.
"""

from functools import partial
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ring_rl.kernels.cost import largest_divisor
from ring_rl.kernels.strategies import all_gather, ring, window
from ring_rl.kernels.strategies.plan import Plan, Side
from ring_rl.kernels.strategies.ring import axis_is_bound
from ring_rl.kernels.tokens import Cotangents
from ring_rl.typing import Array

# What a rematerialisation policy keeps, so that a recomputed layer does not run the strategy a second time.
SAVED_NAMES = ("attention_out", "attention_log_sum_exp")

Exchange = Literal["ring", "window", "all_gather"]
_EXCHANGES: dict[Exchange, ModuleType] = {"ring": ring, "window": window, "all_gather": all_gather}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(plan: Plan, exchange: Exchange, q: Array, k: Array, v: Array, side: Side) -> tuple[Array, Array]:
    """(out [B, T, H, D] in the dtype of q, log_sum_exp [B, H, T] in float32) for this device's queries."""
    return _forward(plan, exchange, q, k, v, side)[0]


def _forward(plan: Plan, exchange: Exchange, q: Array, k: Array, v: Array, side: Side):
    def share(side: Side, q: Array, k: Array, v: Array):
        out, log_sum_exp = _EXCHANGES[exchange].forward(plan, q, k, v, side)
        return out.astype(q.dtype), log_sum_exp

    out, log_sum_exp = _by_heads(plan, share, side, (heads_first(q),), (heads_first(k), heads_first(v)))
    out = checkpoint_name(heads_first(out), SAVED_NAMES[0])
    log_sum_exp = checkpoint_name(log_sum_exp, SAVED_NAMES[1])
    return (out, log_sum_exp), (q, k, v, side, out, log_sum_exp)


def _backward(plan: Plan, exchange: Exchange, saved, gradients):
    q, k, v, side, out, log_sum_exp = saved
    d_out, d_log_sum_exp = gradients
    in_float32 = lambda x: x.astype(jnp.float32)  # noqa: E731
    delta_BHT = jnp.einsum("bthd,bthd->bht", in_float32(out), in_float32(d_out)) - in_float32(d_log_sum_exp)
    # A row that saw nothing has no weights to differentiate: exp(s - inf) = 0 says so without a branch.
    log_sum_exp = jnp.where(log_sum_exp > -jnp.inf, log_sum_exp, jnp.inf)

    def share(side: Side, q, out, log_sum_exp, d_out, delta, k, v):
        cotangents = Cotangents(out, log_sum_exp, d_out, delta)
        dq, dk, dv = _EXCHANGES[exchange].backward(plan, q, k, v, side, cotangents)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    of_queries = (heads_first(q), heads_first(out), log_sum_exp, heads_first(d_out), delta_BHT)
    dq, dk, dv = _by_heads(plan, share, side, of_queries, (heads_first(k), heads_first(v)))
    return heads_first(dq), heads_first(dk), heads_first(dv), None


attend.defvjp(_forward, _backward)


def heads_first(x: Array) -> Array:
    """[B, T, H, D] as [B, H, T, D], and back."""
    return jnp.swapaxes(x, 1, 2)


def _by_heads(plan: Plan, share, side: Side, of_queries: tuple[Array, ...], of_keys: tuple[Array, ...]):
    """`share(side, *of_queries, *of_keys)`, for as many heads of a batch row at a time as the plan says.

    Everything is [B, heads, T, ...]. One head at a time means a ring for each: the same bytes in more transfers, and
    every buffer of it that much smaller.
    """
    (B, H), K = of_queries[0].shape[:2], of_keys[0].shape[1]
    wanted = plan.heads_at_once
    heads = K if wanted is None else largest_divisor(K, at_most=wanted)
    if wanted is None or (B == 1 and heads == K):
        return share(side, *of_queries, *of_keys)
    groups, G = K // heads, H // K
    grouped = lambda x, heads: x.reshape(B * groups, 1, heads, *x.shape[2:])  # noqa: E731
    operands = [grouped(x, heads * G) for x in of_queries] + [grouped(x, heads) for x in of_keys]

    def one_group(index: Array | int, *operands: Array):
        own = side.of_row(index // groups).of_heads((index % groups) * heads * G, heads * G)
        return share(own, *operands)

    if axis_is_bound(plan):
        results = lax.map(lambda x: one_group(*x), (jnp.arange(B * groups), *operands))
    else:
        shares = [one_group(i, *(x[i] for x in operands)) for i in range(B * groups)]
        results = jax.tree.map(lambda *x: jnp.stack(x), *shares)
    return jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[3:]), results)
