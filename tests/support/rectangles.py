"""Random rectangles of queries and keys for a local block, and dense attention of them, in numpy.

A jitted reference would be compiled for every shape; this one lets a test try many.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.kernels import Dropout
from ring_rl.kernels.dropout import kept, query_row_bits
from ring_rl.kernels.local.block import EVERYTHING, Relation, Scoring
from ring_rl.kernels.mask import visible
from ring_rl.kernels.tokens import Cotangents, Keys, Queries

RESULTS = ("out", "lse", "dq", "dk", "dv")
PLAIN = Scoring(scale=0.3)
# Of the error of dense attention in float32, and of the largest value beside it.
_NAIVE_FACTOR, _SLACK = 2, 5e-6
# Positions are padded to it before jax sees them: of one size they need one compilation.
_MOST_TOKENS = 320


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectangle:
    """One call's operands, as numpy arrays; `d_out`, `lse` and `delta` are what other rectangles made of them."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d_out: np.ndarray
    query_positions: np.ndarray
    key_positions: np.ndarray
    segments: tuple[np.ndarray, np.ndarray] | tuple[None, None]
    slopes: np.ndarray | None
    row_bits: np.ndarray | None
    relation: Relation
    scoring: Scoring
    dtype: str = "float32"

    def on_device(self) -> tuple[Queries, Keys, jax.Array]:
        """(queries, keys, d_out)."""
        array = lambda x: None if x is None else jnp.asarray(x)  # noqa: E731
        q, k, v, d_out = (jnp.asarray(x, self.dtype) for x in (self.q, self.k, self.v, self.d_out))
        queries = Queries(q, array(self.query_positions), array(self.segments[0]), array(self.slopes))
        keys = Keys(k, v, array(self.key_positions), array(self.segments[1]))
        return queries._replace(row_bits=array(self.row_bits)), keys, d_out

    def seen(self) -> np.ndarray:
        """[B, 1, T, S], by the package's own rule."""
        tokens = self.query_positions, self.key_positions, *self.segments
        shown = np.asarray(visible(self.relation.mask, *(None if x is None else _padded(x) for x in tokens)))
        return shown[:, None, : self.q.shape[2], : self.k.shape[2]]

    def exact(self, dtype, lse=None, delta=None) -> tuple[np.ndarray, ...]:
        """(out, lse), or given the global lse and delta (dq, dk, dv), dense and in `dtype`."""
        group = self.q.shape[1] // self.k.shape[1]
        q, d_out = self.q.astype(dtype), self.d_out.astype(dtype)
        k, v = (np.repeat(x.astype(dtype), group, axis=1) for x in (self.k, self.v))
        scale, cap = dtype(self.scoring.scale), self.scoring.soft_cap
        logits = scale * (q @ k.swapaxes(-1, -2))
        slope_of_cap = dtype(1.0)
        if cap is not None:
            bounded = np.tanh(logits / dtype(cap))
            logits, slope_of_cap = dtype(cap) * bounded, 1 - bounded**2
        if self.slopes is not None:
            distance = np.abs(self.query_positions[:, None, :, None] - self.key_positions[:, None, None, :])
            logits = logits - self.slopes.astype(dtype)[:, :, None, None] * distance.astype(dtype)
        keep = np.ones((1, 1, 1, 1), dtype)
        if self.row_bits is not None:
            rate = self.scoring.dropout_rate
            keep = kept(self.row_bits[..., None], self.key_positions[:, None, None, :], rate) / dtype(1 - rate)
            keep = keep.astype(dtype)
        logits = np.where(self.seen(), logits, dtype(-np.inf))
        if lse is None:
            most = np.maximum(logits.max(axis=-1, keepdims=True), np.finfo(dtype).min)
            weights = np.exp(logits - most)
            total = weights.sum(axis=-1, keepdims=True)
            blind = total == 0
            out = (weights / np.where(blind, 1, total) * keep) @ v
            with np.errstate(divide="ignore"):
                return out, np.where(blind, -np.inf, most + np.log(total))[..., 0].astype(dtype)
        weights = np.exp(logits - lse.astype(dtype)[..., None])
        d_scores = weights * (keep * (d_out @ v.swapaxes(-1, -2)) - delta.astype(dtype)[..., None]) * slope_of_cap
        grouped = lambda x: x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(axis=2)  # noqa: E731
        dk, dv = d_scores.swapaxes(-1, -2) @ q, (keep * weights).swapaxes(-1, -2) @ d_out
        return scale * (d_scores @ k), scale * grouped(dk), grouped(dv)


def run(block, rectangle: Rectangle, lse=None, delta=None) -> tuple[np.ndarray, ...]:
    """What the block makes of it: (out, lse), or given the global lse and delta (dq, dk, dv)."""
    results = _run(block, *rectangle.on_device(), lse, delta, relation=rectangle.relation, scoring=rectangle.scoring)
    assert all(x.dtype == jnp.float32 for x in results)
    return tuple(map(np.asarray, results))


@functools.partial(jax.jit, static_argnames=("block", "relation", "scoring"))
def _run(block, queries, keys, d_out, lse, delta, *, relation, scoring):
    if lse is None:
        return block.forward(queries, keys, relation=relation, scoring=scoring)
    # No block looks at `out`.
    cotangents = Cotangents(jnp.zeros_like(d_out), lse, d_out, delta)
    return block.backward(queries, keys, cotangents, relation=relation, scoring=scoring)


def made_up(
    *,
    T: int,
    S: int,
    B: int = 1,
    heads: tuple[int, int] = (2, 1),
    D: int = 16,
    relation: Relation = EVERYTHING,
    scoring: Scoring = PLAIN,
    dtype: str = "float32",
    alibi: bool = False,
    packed: bool = False,
    first_query: int = 0,
    first_key: int = 0,
    stride: int = 1,
    rows: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Rectangle:
    """A random one. Positions begin at `first_...`, `stride` apart; `rows` is of how many of the batch each side has
    positions of its own.
    """
    generator = np.random.default_rng(seed)
    shapes = (B, heads[0], T, D), (B, heads[1], S, D), (B, heads[1], S, D), (B, heads[0], T, D)
    # Exact in the dtype: the truth must get what the block gets.
    q, k, v, d_out = (np.asarray(jnp.asarray(generator.normal(size=x), dtype), np.float32) for x in shapes)
    place = lambda n, first, b: (first + stride * np.arange(n) + np.arange(b)[:, None]).astype(np.int32)  # noqa: E731
    query_positions, key_positions = place(T, first_query, rows[0]), place(S, first_key, rows[1])
    document = lambda n: np.sort(generator.integers(-1, 4, (B, n)), axis=1).astype(np.int32)  # noqa: E731
    bits = None
    if scoring.dropout_rate:
        dropout = Dropout(scoring.dropout_rate, jax.random.key(seed))
        positions = jnp.asarray(_padded(query_positions))
        bits = np.asarray(query_row_bits(dropout, positions=positions, batch=B, heads=heads[0]))[:, :, :T]
    return Rectangle(
        q=q,
        k=k,
        v=v,
        d_out=d_out,
        query_positions=query_positions,
        key_positions=key_positions,
        segments=(document(T), document(S)) if packed else (None, None),
        slopes=generator.uniform(0.01, 0.1, (1, heads[0])).astype(np.float32) if alibi else None,
        row_bits=bits,
        relation=relation,
        scoring=scoring,
        dtype=dtype,
    )


def global_sums(rectangle: Rectangle, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lse, delta) as if other rectangles had added to the rectangle's own; rows that saw nothing are silent."""
    delta = np.random.default_rng(7).normal(size=lse.shape)
    return np.where(np.isneginf(lse), np.inf, lse + 0.5).astype(np.float32), delta.astype(np.float32)


def check(block, rectangle: Rectangle) -> tuple[np.ndarray, ...]:
    """Raises AssertionError unless values and gradients are as exact as dense attention in float32; returns them."""
    truth, naive = rectangle.exact(np.float64), rectangle.exact(np.float32)
    sums = global_sums(rectangle, truth[1])
    truth, naive = truth + rectangle.exact(np.float64, *sums), naive + rectangle.exact(np.float32, *sums)
    found = run(block, rectangle) + run(block, rectangle, *sums)
    for name, ours, theirs, expected in zip(RESULTS, found, naive, truth, strict=True):
        np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected))
        finite = np.isfinite(expected)
        largest = np.abs(expected[finite]).max(initial=0)
        allowed = _NAIVE_FACTOR * np.abs(theirs[finite] - expected[finite]).max(initial=0) + _SLACK * largest
        error = np.abs(ours[finite] - expected[finite]).max(initial=0)  # NaN is in no order: not <= anything
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}, largest {largest:.1e}"
    blind = np.isneginf(found[1])
    assert (found[0][blind] == 0).all()
    assert (found[2][blind] == 0).all()
    return found


def _padded(positions: np.ndarray) -> np.ndarray:
    return np.pad(positions, ((0, 0), (0, _MOST_TOKENS - positions.shape[1])))
