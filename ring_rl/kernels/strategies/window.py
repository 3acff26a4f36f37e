"""Sliding-window attention: each stretch of the sequence gets the few keys beside it, and nothing goes round.

A device holds one chunk of the sequence (contiguous) or two (zigzag). A query sees `back` positions before it and
`ahead` after, so chunk g needs the last `back` tokens before it and the first `ahead` after it: parts of chunks
g - 1, g - 2, ... and g + 1, ..., each held by one other device. In the zigzag layout the early chunks' predecessors
are on the device before, the late chunks' on the device after, and where the two meet, on the same device.

    zigzag, R = 4       device    0     1     2     3
                        early     0     1     2     3      chunk g needs g - 1: from device i - 1
                        late      7     6     5     4      from device i + 1; chunk 4 from its own device

What arrives and where it stands relative to the queries is known when the program is compiled, so tiles outside the
window are never computed. Backward fetches the keys again and sends their gradients back the same way.
"""

import collections
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.layout import chunks_per_device
from ring_rl.kernels.local.block import Relation
from ring_rl.kernels.local.ties import Tie
from ring_rl.kernels.online_softmax import begin, finish, merge, where_seen
from ring_rl.kernels.strategies.flight import InFlight
from ring_rl.kernels.strategies.hop import Gradients
from ring_rl.kernels.strategies.plan import Held, Plan, Side
from ring_rl.kernels.tokens import Cotangents, Keys, stack_batches
from ring_rl.typing import Array

# A part that is no multiple of it would leave keys that do not exist in the tiles that most queries see in full.
_TILE = 128


class Neighbour(NamedTuple):
    """The part that chunks need of the chunk `distance` places before them (after, if negative).

    Attributes:
        distance: In chunks.
        start: First token of the part within its chunk.
        stop: End of the part.
    """

    distance: int
    start: int
    stop: int


class Route(NamedTuple):
    """One transfer: chunks in slot `source` of some devices to those who need them in slot `target`.

    Attributes:
        source: Slot of the givers.
        target: Slot of the takers.
        permutation: (giver, taker); in a virtual ring of every device, for jax batches no other permutes: who takes
            nothing is given something all the same.
        takes: Whether a device needs what it is given.
    """

    source: int
    target: int
    permutation: tuple[tuple[int, int], ...]
    takes: tuple[bool, ...]


def serves(plan: Plan, length: int) -> bool:
    """Whether neighbours are enough, and fewer tokens travel than once round the ring."""
    if plan.size == 1 or plan.placed or plan.layout == "striped":
        return False
    back, ahead = plan.mask.reach()
    if back is None or ahead is None:
        return False
    return chunks_per_device(plan.layout) * (back + ahead) < (plan.size - 1) * length


def relations(plan: Plan, length: int) -> tuple[Relation, ...]:
    """Every relation that is asked of the local block."""
    halves = (0, plan.chunk(length) // 2)
    found = [
        *(_own_relation(plan, length, start) for start in halves),
        *(_relation(plan, length, part) for part in _neighbours(plan, length)),
    ]
    return tuple(dict.fromkeys(found))


def forward(plan: Plan, q: Array, k: Array, v: Array, side: Side) -> tuple[Array, Array]:
    """(out, log_sum_exp), float32; `back + ahead` keys and values sent a chunk."""
    length = q.shape[2]
    queries, own = _chunks(plan, plan.queries(q, side)), Held.of(k, v, side)
    neighbours = _neighbours(plan, length)
    flying = InFlight([_fetch(plan, own, part) for part in neighbours])
    state = begin(
        *plan.local.forward(
            queries,
            _chunks(plan, plan.keys(own, plan.index)),
            relation=_own_relation(plan, length),
            scoring=plan.scoring,
            tie=flying.tie,
        )
    )
    for part, held in zip(neighbours, flying.arrays, strict=True):
        exists = _exists(plan, part, q.shape[0])
        out, log_sum_exp = plan.local.forward(
            queries, _placed(plan, held, part, length), relation=_relation(plan, length, part), scoring=plan.scoring
        )
        state = merge(state, out, where_seen(exists[:, None, None], log_sum_exp))
    out, log_sum_exp = finish(state)
    return _unchunk(plan, out), _unchunk(plan, log_sum_exp)


def backward(plan: Plan, q: Array, k: Array, v: Array, side: Side, cotangents: Cotangents) -> Gradients:
    """(dq, dk, dv), float32; fetches the same keys and returns as many float32 elements."""
    length = q.shape[2]
    queries, own = _chunks(plan, plan.queries(q, side)), Held.of(k, v, side)
    cotangents = _chunks(plan, cotangents)
    neighbours = _neighbours(plan, length)
    flying = InFlight([_fetch(plan, own, part) for part in neighbours])

    def own_block(rows: slice, cotangents: Cotangents, tie: Tie) -> Gradients:
        start, stop, _ = rows.indices(plan.chunk(length))
        relation = _own_relation(plan, length, start)
        keys = _chunks(plan, plan.keys(own, plan.index))
        rows_of = lambda x: x.between(start, stop)  # noqa: E731
        return plan.local.backward(
            rows_of(queries), keys, rows_of(cotangents), relation=relation, scoring=plan.scoring, tie=tie
        )

    # One half of the own chunks covers the keys' arrival, the other the return of their gradients.
    half = plan.chunk(length) // 2
    dq_late, dk, dv = own_block(slice(half, None), cotangents, flying.tie)
    dq_beyond, returning = jnp.zeros(queries.q.shape, jnp.float32), []
    for part, held in zip(neighbours, flying.arrays, strict=True):
        exists = _exists(plan, part, q.shape[0])
        silenced = jnp.where(exists[:, None, None], cotangents.log_sum_exp, jnp.inf)
        dq_part, dk_part, dv_part = plan.local.backward(
            queries,
            _placed(plan, held, part, length),
            cotangents._replace(log_sum_exp=silenced),
            relation=_relation(plan, length, part),
            scoring=plan.scoring,
        )
        dq_beyond += dq_part
        returning.append(jnp.stack([dk_part, dv_part])[:, :, :, _filler(part) :])
    # As in a ring: the rest of the own block is what hides the way back.
    returning, dq_beyond, cotangents = lax.optimization_barrier((returning, dq_beyond, cotangents))
    flying = InFlight([_send_back(plan, found, part) for part, found in zip(neighbours, returning, strict=True)])
    if half:
        dq_early, dk_rest, dv_rest = own_block(slice(0, half), cotangents, flying.tie)
        dq_late, dk, dv = jnp.concatenate([dq_early, dq_late], axis=2), dk + dk_rest, dv + dv_rest
    dkv = jnp.stack([dk, dv])
    for part, gradient in zip(neighbours, flying.arrays, strict=True):
        dkv = dkv.at[:, :, :, part.start : part.stop].add(gradient)
    return _unchunk(plan, dq_late + dq_beyond), _unchunk(plan, dkv[0]), _unchunk(plan, dkv[1])


def _neighbours(plan: Plan, length: int) -> list[Neighbour]:
    """The parts of other chunks that a chunk needs, nearest first."""
    chunk = plan.chunk(length)
    # `serves` has seen that both are limited.
    back, ahead = (limit or 0 for limit in plan.mask.reach())
    before = [Neighbour(d, max(0, chunk - (back - (d - 1) * chunk)), chunk) for d in range(1, -(-back // chunk) + 1)]
    after = [Neighbour(-d, 0, min(chunk, ahead - (d - 1) * chunk)) for d in range(1, -(-ahead // chunk) + 1)]
    return [part for part in before + after if abs(part.distance) < plan.size * chunks_per_device(plan.layout)]


def _own_relation(plan: Plan, length: int, start: int = 0) -> Relation:
    """Of a chunk's queries from `start` on to the keys of the same chunk."""
    return Relation(plan.mask, start if plan.blocks_fit(length) else None)


def _relation(plan: Plan, length: int, part: Neighbour) -> Relation:
    # Blocks of block causality are counted from the start of the sequence, which a relative offset does not know.
    relative = plan.mask.causal_block_size == 1
    first = part.start - _filler(part)
    return Relation(plan.mask, part.distance * plan.chunk(length) - first if relative else None)


def _filler(part: Neighbour) -> int:
    """Keys put before a part, so that blocks cut it into whole tiles that end where it does.

    They stand for keys of the same chunk that are beyond the window, and are hidden by it; so there must be as many.
    """
    filler = -(part.stop - part.start) % _TILE
    return filler if part.distance > 0 and filler <= part.start else 0


def _holder(plan: Plan, chunk: int) -> tuple[int, int]:
    """(device, slot) that holds a chunk of the sequence."""
    if plan.layout == "contiguous" or chunk < plan.size:
        return chunk, 0
    return 2 * plan.size - 1 - chunk, 1


def _routes(plan: Plan, distance: int) -> list[Route]:
    """The transfers that bring every chunk the one `distance` places before it."""
    pairs = collections.defaultdict(dict)
    chunks = plan.size * chunks_per_device(plan.layout)
    for chunk in range(chunks):
        if 0 <= chunk - distance < chunks:
            (giver, source), (taker, target) = _holder(plan, chunk - distance), _holder(plan, chunk)
            pairs[source, target][giver] = taker
    virtual = plan.axis_name not in jax.sharding.get_abstract_mesh().manual_axes
    routes = []
    for (source, target), found in sorted(pairs.items()):
        takes = tuple(i in found.values() for i in range(plan.size))
        permutation = _completed(found, plan.size) if virtual else found
        routes.append(Route(source, target, tuple(sorted(permutation.items())), takes))
    return routes


def _completed(pairs: dict[int, int], size: int) -> dict[int, int]:
    """A permutation of all devices that holds `pairs`."""
    givers, takers = set(range(size)) - set(pairs), set(range(size)) - set(pairs.values())
    return pairs | dict(zip(sorted(givers), sorted(takers), strict=True))


def _fetch(plan: Plan, own: Held, part: Neighbour) -> Held:
    """The part for each of this device's chunks, stacked along the batch; zeros where there is no such chunk."""
    slots = chunks_per_device(plan.layout)
    received: list[list[Held]] = [[] for _ in range(slots)]
    chunk = own.kv.shape[3] // slots
    for route in _routes(plan, part.distance):
        cut = slice(route.source * chunk + part.start, route.source * chunk + part.stop)
        piece = Held(own.kv[:, :, :, cut], None, None if own.segment_ids is None else own.segment_ids[:, cut])
        received[route.target].append(jax.tree.map(partial(_send, plan, route), piece))
    total = [jax.tree.map(lambda *x: sum(x[1:], start=x[0]), *pieces) for pieces in received]
    segments = None if own.segment_ids is None else jnp.concatenate([x.segment_ids for x in total])
    return Held(jnp.concatenate([x.kv for x in total], axis=1), None, segments)


def _send(plan: Plan, route: Route, x: Array) -> Array:
    arrived = lax.ppermute(x, plan.axis_name, route.permutation)
    return jnp.where(jnp.asarray(route.takes)[plan.index], arrived, jnp.zeros_like(arrived))


def _send_back(plan: Plan, gradient: Array, part: Neighbour) -> Array:
    """The gradients of the parts, at the chunks that they belong to, stacked along the batch like them."""
    slots = chunks_per_device(plan.layout)
    batch = gradient.shape[1] // slots
    sums = [jnp.zeros((2, batch, *gradient.shape[2:]), jnp.float32) for _ in range(slots)]
    for route in _routes(plan, part.distance):
        # A slot is served by one route on each device: only what came by this one goes back by it.
        found = gradient[:, route.target * batch : (route.target + 1) * batch]
        found = jnp.where(jnp.asarray(route.takes)[plan.index], found, 0.0)
        back = [(taker, giver) for giver, taker in route.permutation]
        sums[route.source] += lax.ppermute(found, plan.axis_name, back)
    return jnp.concatenate(sums, axis=1)


def _exists(plan: Plan, part: Neighbour, batch: int) -> Array:
    """Whether each row of the stacked chunks has such a neighbour."""
    chunks = plan.size * chunks_per_device(plan.layout)
    wanted = [_chunk_of(plan, slot) - part.distance for slot in range(chunks_per_device(plan.layout))]
    return jnp.repeat(jnp.stack([(x >= 0) & (x < chunks) for x in wanted]), batch)


def _placed(plan: Plan, held: Held, part: Neighbour, length: int) -> Keys:
    """The fetched keys with their global positions (any, where there is no such chunk)."""
    chunk, slots = plan.chunk(length), chunks_per_device(plan.layout)
    filler = _filler(part)
    k, v = jnp.pad(held.kv, ((0, 0), (0, 0), (0, 0), (filler, 0), (0, 0)))
    within = part.start - filler + jnp.arange(k.shape[2])
    firsts = jnp.stack([(_chunk_of(plan, slot) - part.distance) * chunk for slot in range(slots)])
    positions = jnp.repeat(firsts, k.shape[0] // slots)[:, None] + within
    segment_ids = held.segment_ids
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (filler, 0)), constant_values=-1)
    return Keys(k, v, positions.astype(jnp.int32), segment_ids)


def _chunk_of(plan: Plan, slot: int) -> Array:
    """Which chunk of the sequence is in a slot of this device."""
    return jnp.asarray(plan.index if slot == 0 else 2 * plan.size - 1 - plan.index)


def _chunks(plan: Plan, x):
    """A stretch of this device's tokens with its chunks side by side in the batch."""
    if plan.layout == "contiguous":
        return x
    half = x[0].shape[2] // 2
    return stack_batches(x.between(0, half), x.between(half, 2 * half))


def _unchunk(plan: Plan, x: Array) -> Array:
    """The inverse of `_chunks` for one array."""
    if plan.layout == "contiguous":
        return x
    half = x.shape[0] // 2
    return jnp.concatenate([x[:half], x[half:]], axis=2)
