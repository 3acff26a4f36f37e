"""One attention, described by a `Case`, against the dense reference in float64: values and every gradient."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.extend.core import JaxprEqn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ring_rl.kernels import CAUSAL, FULL, Dropout, Mask, attention, reference_attention
from ring_rl.kernels.document_balance import balanced_permutation
from ring_rl.kernels.layout import Layout, permutation
from ring_rl.kernels.local.block import LocalBlock, LocalName
from ring_rl.kernels.local.xla import XlaBlock

FLOAT32_TOLERANCE = 1e-5
# Of the error that the reference makes when it computes in bfloat16.
BFLOAT16_FACTOR = 2

MASKS = (
    CAUSAL,
    FULL,
    Mask(causal=True, window=9),
    Mask(causal=False, window=20),
    Mask(causal=True, window=40),
    Mask(causal=True, causal_block_size=4),
    Mask(causal=True, causal_block_size=6, window=11),
)


class Results(NamedTuple):
    """What an attention gives, in natural order and float64."""

    out: np.ndarray
    log_sum_exp: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention and its random inputs.

    Attributes:
        axes: Devices along each mesh axis: () is none, (ring, ulysses) two.
        virtual: On one device, by `jax.vmap`, instead of `jax.shard_map`.
        layout: "balanced" places the tokens of packed rows by `balanced_permutation` and passes their positions.
        heads: Query heads, key-value heads.
        packed: Segment ids, among them documents of one token and padding.
        given_segment_ids: [B, T], instead of random ones.
        poisoned: q, k and v of padding hold NaN: it reaches whatever is computed from them.
        magnitude: Of the queries.
    """

    strategy: str = "ring"
    mask: Mask = CAUSAL
    axes: tuple[int, ...] = ()
    virtual: bool = False
    layout: Layout | Literal["balanced"] = "contiguous"
    tokens: int = 48
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    batch: int = 2
    dtype: str = "float32"
    packed: bool = False
    given_segment_ids: np.ndarray | None = None
    poisoned: bool = False
    soft_cap: float | None = None
    alibi: bool = False
    dropout_rate: float = 0.0
    local: LocalName | LocalBlock = "auto"
    block_size: int | None = None
    heads_at_once: int | None = None
    magnitude: float = 1.0
    seed: int = 0
    check_vma: bool = True

    @functools.cached_property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """q, k, v in natural order, exactly representable in the dtype."""
        generator = np.random.default_rng(self.seed)
        draw = lambda heads: generator.normal(size=(self.batch, self.tokens, heads, self.head_dim))  # noqa: E731
        arrays = self.magnitude * draw(self.heads[0]), draw(self.heads[1]), draw(self.heads[1])
        return tuple(np.asarray(jnp.asarray(x, self.dtype).astype(jnp.float32)) for x in arrays)

    @functools.cached_property
    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        """Of out and of log_sum_exp, in natural order."""
        generator = np.random.default_rng(self.seed + 1)
        out = generator.normal(size=(self.batch, self.tokens, self.heads[0], self.head_dim))
        # As for the inputs: the reference must get what the attention gets.
        out = np.asarray(jnp.asarray(out, self.dtype).astype(jnp.float32))
        return out, generator.normal(size=(self.batch, self.heads[0], self.tokens)).astype(np.float32)

    @functools.cached_property
    def segment_ids(self) -> np.ndarray | None:
        """Documents in one piece each, two of them of one token; one stretch of padding within and one at the end."""
        if self.given_segment_ids is not None:
            return self.given_segment_ids.astype(np.int32)
        if not self.packed:
            return None
        generator = np.random.default_rng(self.seed + 2)
        rows = []
        for _ in range(self.batch):
            cuts = np.sort(generator.choice(np.arange(3, self.tokens - 1), size=4, replace=False))
            row = np.searchsorted(np.concatenate([[1, 2], cuts]), np.arange(self.tokens), side="right")
            row[row == generator.integers(2, 6)] = -1
            row[-1] = -1
            rows.append(row)
        return np.stack(rows).astype(np.int32)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """[B, T]: which token is where."""
        ring_size = self.axes[0] if self.axes else 1
        if self.layout == "balanced":
            ids = np.zeros((self.batch, self.tokens), int) if self.segment_ids is None else self.segment_ids
            return balanced_permutation(ids, ring_size=ring_size)
        order = np.arange(self.tokens)
        if self.axes:
            order = permutation(self.tokens, ring_size=ring_size, layout=self.layout)
        return np.tile(order, (self.batch, 1))

    @property
    def options(self) -> dict:
        """What attention and the reference are told alike."""
        heads = self.heads[0]
        return {
            "mask": self.mask,
            "soft_cap": self.soft_cap,
            "alibi_slopes": jnp.asarray(np.linspace(0.05, 0.4, heads), jnp.float32) if self.alibi else None,
            "dropout": Dropout(self.dropout_rate, jax.random.key(self.seed)) if self.dropout_rate else None,
        }

    def sides(self) -> dict[str, np.ndarray]:
        """Segment ids and positions where attention needs them, in layout order."""
        sides = {}
        if self.segment_ids is not None:
            sides["segment_ids"] = np.take_along_axis(self.segment_ids, self.order, axis=1)
        if self.layout == "balanced":
            sides["positions"] = self.order.astype(np.int32)
        return sides

    def attend(self, q, k, v, sides):
        """Attention over arrays in layout order: (out, log_sum_exp)."""
        names = ("ring", "ulysses")[: len(self.axes)]
        axis_name = None if not names else names[0] if len(names) == 1 else names

        def local(q, k, v, sides):
            return tuple(
                attention(
                    q,
                    k,
                    v,
                    axis_name=axis_name,
                    strategy=self.strategy,
                    layout="contiguous" if self.layout == "balanced" else self.layout,
                    local=self.local,
                    block_size=self.block_size,
                    heads_at_once=self.heads_at_once,
                    **self.options,
                    **sides,
                )
            )

        if not self.axes:
            return local(q, k, v, sides)
        if self.virtual:
            split = lambda x: x.reshape(x.shape[0], *self.axes, -1, *x.shape[2:])  # noqa: E731
            for name in reversed(names):
                local = jax.vmap(local, in_axes=1, out_axes=(1, 2), axis_name=name)
            out, log_sum_exp = local(*jax.tree.map(split, (q, k, v, sides)))
            return out.reshape(q.shape), log_sum_exp.reshape(q.shape[0], q.shape[2], q.shape[1])
        devices = np.array(jax.devices()[: math.prod(self.axes)]).reshape(self.axes)
        tokens, rows = P(None, names), P(None, None, names)
        mesh = Mesh(devices, names)
        sharded = jax.shard_map(local, mesh=mesh, in_specs=tokens, out_specs=(tokens, rows), check_vma=self.check_vma)
        return sharded(q, k, v, sides)

    def differentiated(self, q, k, v, sides, cotangents):
        """(out, log_sum_exp, dq, dk, dv), all in layout order."""
        return _with_gradients(functools.partial(self.attend, sides=sides), (q, k, v), cotangents)

    def jaxpr(self, *, backward: bool):
        """The traced program of `attend`, or of it and its derivative."""
        arrays = [jnp.asarray(x, self.dtype) for x in self.inputs]
        if backward:
            return jax.make_jaxpr(self.differentiated)(*arrays, self.sides(), self.cotangents).jaxpr
        return jax.make_jaxpr(self.attend)(*arrays, self.sides()).jaxpr

    def run(self) -> Results:
        """What attention computes, put back into natural order."""
        there, back = self.order, np.argsort(self.order, axis=1)
        place = lambda x, order: np.take_along_axis(x, order[:, :, None, None], axis=1)  # noqa: E731
        place_rows = lambda x, order: np.take_along_axis(x, order[:, None, :], axis=2)  # noqa: E731
        inputs = self.inputs
        if self.poisoned and self.segment_ids is not None:
            padding = (self.segment_ids < 0)[:, :, None, None]
            inputs = [np.where(padding, np.float32(np.nan), x) for x in inputs]
        arrays = [jnp.asarray(place(x, there), self.dtype) for x in inputs]
        cotangents = place(self.cotangents[0], there), place_rows(self.cotangents[1], there)
        got = jax.jit(self.differentiated)(*arrays, self.sides(), cotangents)
        assert [x.dtype for x in got] == [jnp.dtype(x) for x in (self.dtype, "float32", *[self.dtype] * 3)]
        out, log_sum_exp, *gradients = (np.asarray(x.astype(jnp.float32), np.float64) for x in got)
        return Results(place(out, back), place_rows(log_sum_exp, back), *(place(x, back) for x in gradients))

    def dense(self, dtype: str) -> Results:
        """The reference, computed in `dtype`."""
        with jax.enable_x64(True):
            arrays = [jnp.asarray(x, dtype) for x in self.inputs]
            reference = functools.partial(
                reference_attention, query_segments=self.segment_ids, key_segments=self.segment_ids, **self.options
            )
            got = jax.jit(functools.partial(_with_gradients, reference))(arrays, self.cotangents)
            return Results(*(np.asarray(x, np.float64) for x in got))

    def check(self) -> Results:
        """Raises AssertionError unless attention is exact; returns what it computed.

        Errors are relative to the largest value. float32: at most 1e-5. bfloat16: at most twice the error of the
        reference in bfloat16.
        """
        got, expected = self.run(), self.dense("float64")
        naive = self.dense("bfloat16") if self.dtype == "bfloat16" else None
        np.testing.assert_array_equal(np.isneginf(got.log_sum_exp), np.isneginf(expected.log_sum_exp))
        for name in Results._fields:
            a, b = _finite(name, getattr(got, name)), _finite(name, getattr(expected, name))
            allowed = FLOAT32_TOLERANCE * max(1.0, float(np.abs(b).max()))
            if naive is not None:
                allowed += BFLOAT16_FACTOR * np.abs(_finite(name, getattr(naive, name)) - b).max()
            error = np.abs(a - b).max()  # NaN is in no order: not <= anything
            assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}, {self}"
        if self.segment_ids is not None:
            padding = self.segment_ids < 0
            for name in ("out", "dq", "dk", "dv"):
                assert (getattr(got, name)[padding] == 0).all(), f"{name} of padding is not exactly zero, {self}"
        return got


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    """Rows that see nothing have a log_sum_exp of -inf, of which there is no difference."""
    return np.where(np.isneginf(x), 0.0, x) if name == "log_sum_exp" else x


def _with_gradients(attend: Callable, arrays, cotangents):
    (out, log_sum_exp), pull_back = jax.vjp(attend, *arrays)
    cotangents = cotangents[0].astype(out.dtype), cotangents[1].astype(log_sum_exp.dtype)
    return (out, log_sum_exp, *pull_back(cotangents))


# Of few examples hypothesis takes many from the front: what asks most of an attention comes first.
_AXES = {
    "blockwise": [()],
    "dense": [()],
    "ring": [(8,), (4,), (2,), (1,)],
    "all_gather": [(4,), (8,), (2,), (1,)],
    "ulysses": [(4,), (8,), (2,), (1,)],
    "hybrid": [(4, 2), (2, 2), (2, 4)],
}
_LOCALS = (
    XlaBlock(block_size=24),
    XlaBlock(block_size=16, heads_at_once=2, prefers_positions=True),
    XlaBlock(block_size=7, heads_at_once=1),
    "auto",
)
_OPTIONS = (
    {"soft_cap": 6.0, "alibi": True, "dropout_rate": 0.1},
    {},
    {"dropout_rate": 0.2},
    {"alibi": True},
    {"soft_cap": 4.0},
)


@st.composite
def _cases(draw, strategy: str) -> Case:
    axes = draw(st.sampled_from(_AXES[strategy]))
    # Ulysses deals heads out to the devices.
    several = axes[-1] if strategy in ("ulysses", "hybrid") else 2
    heads = draw(st.sampled_from([(4 * several, several), (2 * several, 1), (several, several)]))
    layout = draw(st.sampled_from(["zigzag", "balanced", "striped", "contiguous"])) if axes else "contiguous"
    return Case(
        strategy=strategy,
        axes=axes,
        layout=layout,
        mask=draw(st.sampled_from(MASKS)),
        # Of one token a chunk; of odd chunks, that no tile divides.
        tokens=16 * draw(st.sampled_from([7, 3, 1])),
        heads=heads,
        head_dim=draw(st.sampled_from([64, 128])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        packed=draw(st.sampled_from([True, False])),
        local=draw(st.sampled_from(_LOCALS)),
        seed=draw(st.integers(0, 2**16)),
        **draw(st.sampled_from(_OPTIONS)),
    )


def _equations(jaxpr, times: int = 1) -> Iterator[tuple[JaxprEqn, int]]:
    """Every equation of a program with the number of times that it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner, inner_times)


@pytest.fixture(scope="session")
def case() -> type[Case]:
    """Makes a `Case`."""
    return Case


@pytest.fixture(scope="session")
def cases() -> Callable[[str], st.SearchStrategy[Case]]:
    """Random cases of a strategy: layouts, masks, rings, heads, dtypes, lengths, local blocks and options."""
    return _cases


@pytest.fixture(scope="session")
def equations() -> Callable:
    """Walks over a traced program: (equation, how many times it runs)."""
    return _equations
