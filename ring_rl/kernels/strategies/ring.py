"""Ring attention: every device keeps its queries, keys and values travel round the ring.

At hop t device i holds the keys and values of device j = i - t (mod R). It passes them on first and computes
meanwhile, so a transfer is hidden wherever a block takes longer than a hop. R - 1 hops bring everything past
everyone; each device only ever holds two shards. Ring Attention with Blockwise Transformers, arXiv:2310.01889.

Backward goes round once more. The gradients of a shard of keys travel with it, one hop behind: while a device
works on shard j, the sum of what its predecessors found for shard j is on the way. The device's own block is
cut in two, the first part covering the first arrival of keys, the second the last hop, in which the sums come
home; a device's own share is added there and never travels.

One `custom_vjp` spans all of this and saves q, k, v, out and log_sum_exp only: O(T / R) memory a device.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ring_rl.kernels.layout import Layout, check_length
from ring_rl.kernels.local.block import LocalBlock, LocalName, select_block
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.online_softmax import Partial, begin, finish
from ring_rl.kernels.strategies import hop as hops
from ring_rl.typing import Array, Float, Float32

DEFAULT_BLOCK_SIZE = 512
# What a rematerialisation policy keeps, so that a recomputed layer does not run the ring a second time.
SAVED_NAMES = ("attention_out", "attention_log_sum_exp")


def ring_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    axis_name: str,
    mask: Mask,
    layout: Layout,
    scale: float | None = None,
    local: LocalName | LocalBlock = "auto",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Float[Array, "B T H D"]:
    """softmax(scale q kᵀ + mask) v over a sequence that is sharded over mesh axis `axis_name`.

    Call it where the axis is bound: inside `jax.shard_map`, or inside `jax.vmap(axis_name=...)`, which puts a
    virtual ring of any size on one device.

    Args:
        q: This device's queries, in `layout` order. H must be a multiple of K (grouped-query attention).
        k: This device's keys.
        v: This device's values.
        axis_name: The mesh axis that the sequence is sharded over.
        mask: What may attend to what.
        layout: Which tokens a device holds. "zigzag" balances causal work; "contiguous" leaves the first
            devices computing blocks that are thrown away.
        scale: Multiplies q kᵀ; 1/√D by default.
        local: The block that computes one device's share.
        block_size: Largest edge of a tile of scores.

    Returns:
        The output for this device's queries, in the dtype of q; sums are float32 throughout.

    Raises:
        ValueError: The shapes do not fit together, or the layout does not divide them.

    Per device O(T · R T) work, O(T) memory (T is the local length), 2 (R-1) T K D elements sent forward, and
    as many in backward plus as many float32.
    """
    return ring_attention_with_log_sum_exp(
        q,
        k,
        v,
        axis_name=axis_name,
        mask=mask,
        layout=layout,
        scale=scale,
        local=local,
        block_size=block_size,
    )[0]


def ring_attention_with_log_sum_exp(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    axis_name: str,
    mask: Mask,
    layout: Layout,
    scale: float | None = None,
    local: LocalName | LocalBlock = "auto",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B H T"]]:
    """`ring_attention` and log Σ exp(scale q kᵀ + mask) in natural base, both differentiable."""
    _check_shapes(q, k, v)
    ring_size = lax.axis_size(axis_name)
    check_length(q.shape[1] * ring_size, ring_size=ring_size, layout=layout)
    ring = _Ring(
        axis_name=axis_name,
        size=ring_size,
        layout=layout,
        causal=mask.causal,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        local=select_block(local, block_size=block_size),
    )
    return _ring_attention(ring, q, k, v)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Everything about a ring that is known when it is compiled."""

    axis_name: str
    size: int
    layout: Layout
    causal: bool
    scale: float
    local: LocalBlock

    def send(self, x: Array) -> Array:
        """What the previous device holds; this device's goes to the next one."""
        return lax.ppermute(x, self.axis_name, [(i, (i + 1) % self.size) for i in range(self.size)])

    def sender_is_earlier(self, hop: Array | int) -> Array:
        """Whether the keys of this hop come from a device with a smaller index, that is j < i."""
        return lax.axis_index(self.axis_name) >= hop

    @property
    def forward_hop(self):
        """The share of one hop in forward, for this mask and layout."""
        if not self.causal:
            return hops.full_forward
        return hops.zigzag_forward if self.layout == "zigzag" else hops.contiguous_forward

    @property
    def backward_hop(self):
        """The share of one hop in backward, for this mask and layout."""
        if not self.causal:
            return hops.full_backward
        return hops.zigzag_backward if self.layout == "zigzag" else hops.contiguous_backward


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    return _forward(ring, q, k, v)[0]


def _forward(ring: _Ring, q: Array, k: Array, v: Array):
    def hop(state: Partial, held: Array, t: Array | int) -> Partial:
        k, v = held
        earlier = ring.sender_is_earlier(t)
        return ring.forward_hop(state, q, k, v, earlier=earlier, local=ring.local, scale=ring.scale)

    def own_block() -> Partial:
        # Both layouts hold their tokens in ascending order, so the own block is plain causal attention.
        return begin(*ring.local.forward(q, k, v, causal=ring.causal, scale=ring.scale))

    if ring.size == 1:
        state = own_block()
    else:
        # Keys and values travel as one array: half as many transfers to start and to wait for.
        arriving = ring.send(jnp.stack([k, v]))
        state = own_block()
        arriving, state = lax.optimization_barrier((arriving, state))

        def pass_on_and_attend(carry, t):
            held, state = carry
            arriving = ring.send(held)
            return lax.optimization_barrier((arriving, hop(state, held, t)))

        held, state = _repeat(ring, pass_on_and_attend, (arriving, state), 1, ring.size - 1)
        state = hop(state, held, ring.size - 1)
    out, log_sum_exp = finish(state)
    out = checkpoint_name(out.astype(q.dtype), SAVED_NAMES[0])
    log_sum_exp = checkpoint_name(log_sum_exp, SAVED_NAMES[1])
    return (out, log_sum_exp), (q, k, v, out, log_sum_exp)


def _backward(ring: _Ring, saved, cotangents):
    q, k, v, out, log_sum_exp = saved
    d_out, d_log_sum_exp = cotangents
    delta_BHT = jnp.einsum("bthd,bthd->bht", out.astype(jnp.float32), d_out.astype(jnp.float32)) - d_log_sum_exp.astype(
        jnp.float32
    )
    # A row that saw nothing has no weights to differentiate: exp(s - inf) = 0 says so without a branch.
    log_sum_exp = jnp.where(log_sum_exp > -jnp.inf, log_sum_exp, jnp.inf)
    queries = hops.Queries(q, out, log_sum_exp, d_out, delta_BHT)

    def hop(held: Array, t: Array | int) -> tuple[Array, Array]:
        k, v = held
        earlier = ring.sender_is_earlier(t)
        dq, dk, dv = ring.backward_hop(queries, k, v, earlier=earlier, local=ring.local, scale=ring.scale)
        return dq, jnp.stack([dk, dv])

    first_part, second_part = hops.own_block_parts(q.shape[1], causal=ring.causal)
    own_block = partial(hops.own_block_backward, queries, k, v, local=ring.local, scale=ring.scale)

    if ring.size == 1:
        dq, dk, dv = _add(own_block(parts=first_part), own_block(parts=second_part))
    else:
        arriving = ring.send(jnp.stack([k, v]))
        dq, dk_own, dv_own = own_block(parts=first_part)
        # The barriers state the order that hides a transfer behind a block; without them a scheduler may let
        # the keys run ahead of the compute and bunch the other transfers.
        held, dq, dk_own, dv_own = lax.optimization_barrier((arriving, dq, dk_own, dv_own))

        # `travelling` is the sum of what every device so far found for dk and dv of the shard it held.
        if ring.size == 2:
            dq_hop, travelling = hop(held, 1)
        else:
            arriving = ring.send(held)
            dq_hop, travelling = hop(held, 1)
            held, travelling, dq = lax.optimization_barrier((arriving, travelling, dq + dq_hop))

            def pass_on_and_differentiate(carry, t):
                held, travelling, dq = carry
                arriving, sums = ring.send(held), ring.send(travelling)
                dq_hop, found = hop(held, t)
                return lax.optimization_barrier((arriving, sums + found, dq + dq_hop))

            carry = (held, travelling, dq)
            held, travelling, dq = _repeat(ring, pass_on_and_differentiate, carry, 2, ring.size - 1)
            sums = ring.send(travelling)
            dq_hop, found = hop(held, ring.size - 1)
            travelling = sums + found
        dq, travelling = lax.optimization_barrier((dq + dq_hop, travelling))
        dk_home, dv_home = ring.send(travelling)
        dq, dk_own, dv_own = _add((dq, dk_own, dv_own), own_block(parts=second_part))
        dk, dv = dk_own + dk_home, dv_own + dv_home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_ring_attention.defvjp(_forward, _backward)


def _repeat(ring: _Ring, hop, carry, start: int, stop: int):
    """`carry` after hops start, ..., stop - 1, which all do the same."""
    try:
        lax.axis_size(ring.axis_name)
    except NameError:
        # The backward of a virtual ring that is differentiated from outside its vmap: jax applies the
        # collectives to batched values but knows no axis name while it traces the body of a loop. Unrolled,
        # there is no such body.
        for t in range(start, stop):
            carry = hop(carry, t)
        return carry
    return lax.scan(lambda carry, t: (hop(carry, t), None), carry, jnp.arange(start, stop))[0]


def _add(left, right) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q, k, v must be [batch, tokens, heads, head_dim], got {q.shape}, {k.shape}, {v.shape}")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v must have one shape and dtype, got {k.shape} {k.dtype} and {v.shape} {v.dtype}")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"q {q.shape} and k {k.shape} must agree in batch, local tokens and head dimension; "
            "only the number of heads may differ"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key-value heads; "
            "the first must be a multiple of the second"
        )
