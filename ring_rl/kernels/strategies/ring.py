"""Ring attention: every device keeps its queries, keys and values travel round the ring.

At hop t device i holds the keys and values of device j = i - t (mod R). It passes them on first and computes
meanwhile, so a transfer is hidden wherever a block takes longer than a hop. R - 1 hops bring everything past
everyone; each device only ever holds two shards. Ring Attention with Blockwise Transformers, arXiv:2310.01889.

Backward goes round once more. The gradients of a shard of keys travel with it, one hop behind: while a device works
on shard j, the sum of what its predecessors found for shard j is on the way. The device's own block is cut in two,
the first part covering the first arrival of keys, the second the last hop, in which the sums come home; a device's
own share is added there and never travels.
"""

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.local.block import EVERYTHING, Relation
from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.online_softmax import Partial, begin, finish
from ring_rl.kernels.strategies import hop as hops
from ring_rl.kernels.strategies.flight import InFlight
from ring_rl.kernels.strategies.plan import Held, Plan, Side
from ring_rl.kernels.tokens import Cotangents
from ring_rl.typing import Array


def relations(plan: Plan, length: int) -> tuple[Relation, ...]:
    """Every relation that is asked of the local block, forward and backward; `length` is that of a shard."""
    found = [plan.own_relation(length)]
    if plan.size > 1:
        found.append(Relation(plan.mask) if plan.hop_kind(length) == "by_position" else EVERYTHING)
        first_part, second_part = hops.own_block_parts(plan, length)
        found += [part.relation for part in first_part + second_part]
    return tuple(dict.fromkeys(found))


def forward(plan: Plan, q: Array, k: Array, v: Array, side: Side) -> tuple[Array, Array]:
    """(out, log_sum_exp), float32; 2 (R-1) T K D elements sent a device, T being its share of the tokens."""
    queries, own = plan.queries(q, side), Held.of(k, v, side)

    def hop(state: Partial, held: Held, t: Array | int, tie: Tie = untied) -> Partial:
        visitor = plan.keys(held, sender(plan, t))
        return hops.forward(plan, state, queries, visitor, earlier=sender_is_earlier(plan, t), tie=tie)

    def own_block(tie: Tie = untied) -> Partial:
        keys, relation = plan.keys(own, plan.index), plan.own_relation(q.shape[2])
        return begin(*plan.local.forward(queries, keys, relation=relation, scoring=plan.scoring, tie=tie))

    if plan.size == 1:
        return finish(own_block())
    flying = InFlight(plan.send(own))
    state = own_block(flying.tie)

    def pass_on_and_attend(carry, t):
        held, state = carry
        flying = InFlight(plan.send(held))
        state = hop(state, held, t, flying.tie)
        return flying.arrays, state

    held, state = repeat(plan, pass_on_and_attend, (flying.arrays, state), 1, plan.size - 1)
    return finish(hop(state, held, plan.size - 1))


def backward(plan: Plan, q: Array, k: Array, v: Array, side: Side, cotangents: Cotangents) -> hops.Gradients:
    """(dq, dk, dv), float32; sends k and v once more and as many float32 elements of dk and dv."""
    queries, own = plan.queries(q, side), Held.of(k, v, side)

    def hop(held: Held, t: Array | int, tie: Tie) -> tuple[Array, Array]:
        visitor = plan.keys(held, sender(plan, t))
        earlier = sender_is_earlier(plan, t)
        dq, dk, dv = hops.backward(plan, queries, visitor, cotangents, earlier=earlier, tie=tie)
        return dq, jnp.stack([dk, dv])

    def own_block(parts: list[hops.Rectangle], cotangents: Cotangents, tie: Tie = untied) -> hops.Gradients:
        return hops.own_block_backward(plan, queries, plan.keys(own, plan.index), cotangents, parts=parts, tie=tie)

    if plan.size == 1:
        return own_block([hops.Rectangle(0, q.shape[2], 0, k.shape[2], plan.own_relation(q.shape[2]))], cotangents)
    first_part, second_part = hops.own_block_parts(plan, q.shape[2])
    flying = InFlight(plan.send(own))
    dq, dk_own, dv_own = own_block(first_part, cotangents, flying.tie)
    held = flying.arrays

    # `travelling` is the sum of what every device so far found for dk and dv of the shard it held.
    if plan.size == 2:
        dq_hop, travelling = hop(held, 1, untied)
    else:
        flying = InFlight(plan.send(held))
        dq_hop, travelling = hop(held, 1, flying.tie)

        def pass_on_and_differentiate(carry, t):
            held, travelling, dq = carry
            flying = InFlight((plan.send(held), plan.send(travelling)))
            dq_hop, found = hop(held, t, flying.tie)
            held, sums = flying.arrays
            return held, sums + found, dq + dq_hop

        carry = (flying.arrays, travelling, dq + dq_hop)
        held, travelling, dq = repeat(plan, pass_on_and_differentiate, carry, 2, plan.size - 1)
        flying = InFlight(plan.send(travelling))
        dq_hop, found = hop(held, plan.size - 1, flying.tie)
        travelling = flying.arrays + found
    # What is still to be merged must not be what hides the way home, nor may the rest of the own block run before it.
    travelling, dq, cotangents = lax.optimization_barrier((travelling, dq + dq_hop, cotangents))
    flying = InFlight(plan.send(travelling))
    dq_rest, dk_rest, dv_rest = own_block(second_part, cotangents, flying.tie)
    dk_home, dv_home = flying.arrays
    return dq + dq_rest, dk_own + dk_rest + dk_home, dv_own + dv_rest + dv_home


def sender(plan: Plan, t: Array | int) -> Array:
    """The device whose keys are here at hop t."""
    return jnp.asarray((plan.index - t) % plan.size)


def sender_is_earlier(plan: Plan, t: Array | int) -> Array:
    """Whether those keys come from a device with a smaller index, j < i."""
    return jnp.asarray(plan.index >= t)


def axis_is_bound(plan: Plan) -> bool:
    """False in the backward of a virtual ring that is differentiated from outside its vmap.

    There jax applies permutes to batched values, but knows the axis by name neither in loops nor in collectives that
    ask for its size.
    """
    if plan.axis_name is None:
        return True
    try:
        lax.axis_size(plan.axis_name)
    except NameError:
        return False
    return True


def repeat(plan: Plan, hop, carry, start: int, stop: int):
    """`carry` after hops start, ..., stop - 1, which all do the same."""
    if not axis_is_bound(plan):
        for t in range(start, stop):
            carry = hop(carry, t)
        return carry
    return lax.scan(lambda carry, t: (hop(carry, t), None), carry, jnp.arange(start, stop))[0]
