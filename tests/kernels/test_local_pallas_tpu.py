"""The TPU block, its kernels interpreted on a CPU, against the XLA block and the dense reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from ring_rl.kernels.local.block import DIAGONAL, EVERYTHING, Demand, Relation, Scoring
from ring_rl.kernels.local.pallas_tpu import PallasTpuBlock
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.mask import CAUSAL, Mask
from ring_rl.kernels.reference import reference_attention
from ring_rl.kernels.tokens import Cotangents, Keys, Queries

BLOCK = PallasTpuBlock(block_size=128, interpret=True)
D = 16


def _rectangle(*, T, S, H=2, K=1, B=2, dtype=jnp.float32, positions=None, segments=False, alibi=False, seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), dtype)  # noqa: E731
    documents = lambda n: jnp.asarray(np.sort(generator.integers(-1, 4, (B, n)), axis=1), jnp.int32)  # noqa: E731
    p, s = (jnp.arange(n, dtype=jnp.int32)[None] for n in (T, S)) if positions is None else positions
    slopes = jnp.asarray(generator.uniform(0.01, 0.1, (1, H)), jnp.float32) if alibi else None
    queries = Queries(draw(B, H, T, D), p, documents(T) if segments else None, slopes)
    keys = Keys(draw(B, K, S, D), draw(B, K, S, D), s, documents(S) if segments else None)
    return queries, keys, draw(B, H, T, D), generator


def _scattered(T, S, *, rows, seed=1):
    generator = np.random.default_rng(seed)
    draw = lambda n: np.stack([np.sort(generator.permutation(2 * max(T, S))[:n]) for _ in range(rows)])  # noqa: E731
    return jnp.asarray(draw(T), jnp.int32), jnp.asarray(draw(S), jnp.int32)


def _relative_error(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    return float(np.max(np.abs(found[finite] - expected[finite]), initial=0) / np.max(np.abs(expected[finite])))


CASES = {
    "everything, lengths of no whole tile": (EVERYTHING, {"T": 200, "S": 300}, {}),
    "soft cap, as many heads": (EVERYTHING, {"T": 128, "S": 256, "H": 2, "K": 2}, {"soft_cap": 3.0}),
    "diagonal with ALiBi": (DIAGONAL, {"T": 256, "S": 256, "alibi": True}, {}),
    "window far back, with empty rows": (Relation(Mask(causal=True, window=40), -100), {"T": 256, "S": 300}, {}),
    "window both ways, packed": (
        Relation(Mask(causal=False, window=40), 10),
        {"T": 256, "S": 300, "segments": True},
        {},
    ),
    "blocks of causality, padded": (Relation(Mask(causal=True, causal_block_size=8), 16), {"T": 130, "S": 200}, {}),
    "by position, ALiBi": (
        Relation(CAUSAL),
        {"T": 256, "S": 300, "alibi": True, "positions": _scattered(256, 300, rows=2)},
        {},
    ),
    "by position that rows share, packed": (
        Relation(Mask(causal=True, window=90)),
        {"T": 256, "S": 300, "segments": True, "positions": _scattered(256, 300, rows=1)},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_xla_block(case):
    relation, shapes, options = CASES[case]
    queries, keys, d_out, generator = _rectangle(**shapes)
    scoring, xla = Scoring(scale=0.3, **options), XlaBlock(block_size=64)

    @jax.jit
    def both(queries, keys, d_out, delta):
        expected = xla.forward(queries, keys, relation=relation, scoring=scoring)
        # As if other rectangles had added to the sums; rows that see nothing at all must be silent.
        lse = jnp.where(expected[1] > -jnp.inf, expected[1] + 0.5, jnp.inf)
        cotangents = Cotangents(expected[0], lse, d_out, delta)
        gradients = lambda block: block.backward(queries, keys, cotangents, relation=relation, scoring=scoring)  # noqa: E731
        found = BLOCK.forward(queries, keys, relation=relation, scoring=scoring)
        return (*found, *gradients(BLOCK)), (*expected, *gradients(xla))

    delta = jnp.asarray(generator.normal(size=d_out.shape[:3]), jnp.float32)
    found, expected = both(queries, keys, d_out, delta)
    for ours, theirs in zip(found, expected, strict=True):
        assert _relative_error(ours, theirs) < 3e-6
    empty = np.isneginf(np.asarray(found[1]))
    if "empty" in case:
        assert 0.1 < empty.mean() < 0.9
    assert not np.any(np.asarray(found[0])[empty])


def test_half_precision_is_summed_in_float32():
    """Results are float32, and no further from the truth than one rounding of the weights."""
    queries, keys, d_out, _ = _rectangle(T=256, S=256, K=2, dtype=jnp.bfloat16)
    out, lse = BLOCK.forward(queries, keys, relation=DIAGONAL, scoring=Scoring(scale=0.3))
    widened = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (queries.q, keys.k, keys.v))
    expected, expected_lse = reference_attention(*widened, mask=CAUSAL, scale=0.3)
    assert _relative_error(lse, expected_lse) < 1e-6
    assert _relative_error(out, jnp.swapaxes(expected, 1, 2)) < 2**-8
    delta = jnp.einsum("bhtd,bhtd->bht", out, d_out.astype(jnp.float32))
    for gradient in BLOCK.backward(
        queries, keys, Cotangents(out, lse, d_out, delta), relation=DIAGONAL, scoring=Scoring(scale=0.3)
    ):
        assert gradient.dtype == jnp.float32


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_huge_logits(magnitude):
    queries, keys, _, _ = _rectangle(T=128, S=128)
    scoring = Scoring(scale=magnitude)
    found = BLOCK.forward(queries, keys, relation=DIAGONAL, scoring=scoring)
    expected = XlaBlock(block_size=64).forward(queries, keys, relation=DIAGONAL, scoring=scoring)
    for ours, theirs in zip(found, expected, strict=True):
        assert _relative_error(ours, theirs) < 1e-4


def test_tiles_that_nobody_sees_are_skipped():
    """A NaN where nobody looks does not show."""
    queries, keys, _, _ = _rectangle(T=256, S=256)
    keys = keys._replace(v=keys.v.at[:, :, 128:].set(jnp.nan))
    out, _ = BLOCK.forward(queries, keys, relation=DIAGONAL, scoring=Scoring(scale=0.3))
    assert not np.any(np.isnan(out[:, :, :128]))
    assert np.all(np.isnan(out[:, :, 128:]))


def test_a_tie_sees_the_raw_results_before_they_are_used():
    queries, keys, d_out, _ = _rectangle(T=128, S=128)
    seen = []

    def doubled(results):
        seen.append([x.shape for x in results])
        return tuple(2 * x for x in results)

    options = {"relation": DIAGONAL, "scoring": Scoring(scale=0.3)}
    plain, tied = (BLOCK.forward(queries, keys, **options, **more) for more in ({}, {"tie": doubled}))
    np.testing.assert_allclose(tied[0], 2 * plain[0])
    cotangents = Cotangents(plain[0], plain[1], d_out, plain[1])
    for once, twice in zip(
        BLOCK.backward(queries, keys, cotangents, **options),
        BLOCK.backward(queries, keys, cotangents, **options, tie=doubled),
        strict=True,
    ):
        np.testing.assert_allclose(twice, 2 * once)
    assert [len(shapes) for shapes in seen] == [2, 3]


def test_on_a_mesh_and_as_a_virtual_ring():
    """Interpreting a kernel under shard_map needs its check off; compiled for a TPU it does not."""
    queries, *_ = _rectangle(T=256, S=256)

    def block(q):
        positions = jnp.arange(128, dtype=jnp.int32)[None]
        keys = Keys(q[:, :1], q[:, :1], positions)
        return BLOCK.forward(Queries(q, positions), keys, relation=Relation(CAUSAL), scoring=Scoring(scale=0.3))[0]

    mesh = DeviceMesh(np.array(jax.devices()[:2]), ("sp",))
    over_devices = jax.shard_map(
        block, mesh=mesh, in_specs=P(None, None, "sp"), out_specs=P(None, None, "sp"), check_vma=False
    )
    split = queries.q.reshape(2, 2, 2, 128, D)
    virtual = jax.vmap(block, in_axes=2, out_axes=2)(split)
    np.testing.assert_allclose(jax.jit(over_devices)(queries.q), virtual.reshape(queries.q.shape), atol=1e-6)


def _demand(**changes) -> Demand:
    fields = {
        "dtype": "bfloat16",
        "head_dim": 64,
        "query_heads": 4,
        "key_value_heads": 2,
        "length": 100,
        "devices": 2,
        "relations": (Relation(CAUSAL), EVERYTHING),
        "segments": True,
        "alibi": True,
        "scoring": Scoring(scale=0.1, soft_cap=10.0),
        "log_sum_exp_gradient": True,
    }
    return Demand(**(fields | changes))


def test_refusals():
    assert BLOCK.refusal(_demand()) is None
    assert PallasTpuBlock(block_size=128, cross_compile=True).refusal(_demand()) is None
    assert "needs a TPU and this platform is 'cpu'" in PallasTpuBlock(block_size=128).refusal(_demand())
    assert "not in float16" in BLOCK.refusal(_demand(dtype="float16"))
    assert "no dropout" in BLOCK.refusal(_demand(scoring=Scoring(scale=1.0, dropout_rate=0.1)))
    with pytest.raises(ValueError, match="multiple of 128 tokens, got 100"):
        PallasTpuBlock(block_size=100)
