"""The local block of a CPU: C++ of our own, compiled for the processor when it is first asked for.

XLA's loops on a CPU run one after another, each product a call of its own; here a thread takes a stretch of queries
(backward: of keys) through all of its tiles, which never leave the core's cache, and all cores work on one rectangle.
"""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.kernels.dropout import drop_threshold
from ring_rl.kernels.local.block import Demand, Relation, Scoring
from ring_rl.kernels.local.native_build import BACKWARD, FORWARD, NativeBuildError, register
from ring_rl.kernels.local.ties import Tie, untied
from ring_rl.kernels.tokens import Cotangents, Keys, Queries
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Float32

_DTYPES = ("float32", "bfloat16")
# Of native/rectangle.h: kTile, and the keys of one piece of work in backward, kPacked tiles of them.
_TILE = 64
_KEYS_A_PIECE = 256
# Share of the cores' time that backward's pieces of work may leave unused.
_IDLE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeCpuBlock:
    """Blockwise attention on a CPU in C++: every mask and option; O(visible tiles) work, O(cores D) memory besides.

    Attributes:
        cores: How many cores share one call: those of the machine, less those that other devices of it use. Backward
            cuts the keys of a head into shares where there are fewer heads than cores, at a copy of dq a share.
        heads_at_once: How many key-value heads of one batch row a strategy should pass at a time; None is all. Tiles
            stay in cache however many there are.
    """

    cores: int
    heads_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.cores < 1:
            raise ValueError(f"cores must be at least 1, got {self.cores}")
        if self.heads_at_once is not None and self.heads_at_once < 1:
            raise ValueError(f"heads_at_once must be at least 1, or None for all; got {self.heads_at_once}")

    @property
    def looks_at_positions(self) -> bool:
        """Yes."""
        return True

    @property
    def prefers_positions(self) -> bool:
        """Yes: what nobody sees is skipped for the price of a comparison."""
        return True

    def refusal(self, demand: Demand) -> str | None:
        """See `LocalBlock.refusal`."""
        here = jax.default_backend()
        if here != "cpu":
            return f"it computes on CPUs and this platform is {here!r}"
        if demand.dtype not in _DTYPES:
            return f"it computes in {' or '.join(_DTYPES)}, not in {demand.dtype}"
        return _missing()

    def forward(
        self, queries: Queries, keys: Keys, *, relation: Relation, scoring: Scoring, tie: Tie = untied
    ) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
        """See `LocalBlock.forward`."""
        shape = queries.q.shape
        if shape[2] < _TILE:
            queries = _grouped(queries, key_value_heads=keys.k.shape[1])
        grouped = queries.q.shape
        out, log_sum_exp = tie(
            _call(FORWARD, (grouped, grouped[:-1]), _operands(queries, keys), **_settings(relation, scoring))
        )
        return out.reshape(shape), log_sum_exp.reshape(shape[:-1])

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
        (B, H, T, D), (K, S) = queries.q.shape, keys.k.shape[1:3]
        shares = shares_of_keys(pieces=B * K, keys=S, cores=self.cores)
        dq, dk, dv = _call(
            BACKWARD,
            ((B, shares, H, T, D), (B, K, S, D), (B, K, S, D)),
            (*_operands(queries, keys), cotangents.d_out, cotangents.log_sum_exp, cotangents.delta),
            **_settings(relation, scoring),
            shares=np.int64(shares),
        )
        dq, dk, dv = tie((dq, dk, dv))
        return dq[:, 0] if shares == 1 else jnp.sum(dq, axis=1), dk, dv


def shares_of_keys(*, pieces: int, keys: int, cores: int) -> int:
    """How many shares backward cuts the keys of each of `pieces` heads into: the fewest that keep all cores busy."""
    most = max(1, min(cores, math.ceil(keys / _KEYS_A_PIECE)))
    for shares in range(1, most):
        rounds = math.ceil(pieces * shares / cores)
        if pieces * shares >= (1 - _IDLE) * cores * rounds:
            return shares
    return most


def cores_here() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@functools.cache
def _missing() -> str | None:
    try:
        register()
    except NativeBuildError as error:
        return str(error)
    return None


def _grouped(queries: Queries, *, key_value_heads: int) -> Queries:
    """The queries of the heads that share a key-value head as more tokens of one, so that its keys are read once.

    ALiBi tells heads apart, so with it they stay what they are.
    """
    B, H, T, D = queries.q.shape
    if key_value_heads in (0, H) or H % key_value_heads or queries.slopes is not None:
        return queries
    G = H // key_value_heads
    return Queries(
        queries.q.reshape(B, key_value_heads, G * T, D),
        jnp.tile(queries.positions, (1, G)),
        None if queries.segment_ids is None else jnp.tile(queries.segment_ids, (1, G)),
        None,
        None if queries.row_bits is None else queries.row_bits.reshape(B, key_value_heads, G * T),
    )


def _operands(queries: Queries, keys: Keys) -> tuple[Array, ...]:
    """What both passes are given; an empty array stands for what is not used. Positions say what a relation's offset
    does, and more.
    """
    register()
    nothing = lambda x, dtype: jnp.zeros((1, 0), dtype) if x is None else x  # noqa: E731
    return (
        queries.q,
        keys.k,
        keys.v,
        queries.positions,
        keys.positions,
        nothing(queries.segment_ids, jnp.int32),
        nothing(keys.segment_ids, jnp.int32),
        nothing(queries.slopes, jnp.float32),
        nothing(queries.row_bits, jnp.uint32),
    )


def _settings(relation: Relation, scoring: Scoring) -> dict[str, np.generic]:
    """The attributes that both passes share."""
    mask = relation.mask
    return {
        "scale": np.float32(scoring.scale),
        "soft_cap": np.float32(scoring.soft_cap or 0.0),
        "kept_scale": np.float32(1.0 / (1.0 - scoring.dropout_rate)),
        "drop_below": drop_threshold(scoring.dropout_rate),
        "causal_block": np.int64(mask.causal_block_size if mask.causal else 0),
        "window": np.int64(mask.window or 0),
    }


def _call(name: str, shapes: tuple[tuple[int, ...], ...], operands: tuple[Array, ...], **settings: np.generic):
    """float32 results of those shapes; a virtual ring's devices come as more rows of the batch."""
    operands = vary_alike(*operands)

    def like(operand: Array) -> tuple[Array, ...]:
        return tuple(jnp.broadcast_to(operand.ravel()[0].astype(jnp.float32), shape) for shape in shapes)

    results = jax.eval_shape(like, operands[0])
    return tuple(jax.ffi.ffi_call(name, results, vmap_method="broadcast_all")(*operands, **settings))
