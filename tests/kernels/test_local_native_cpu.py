"""The C++ block of CPUs against dense attention in float64, and against the XLA block where that is the specification.

Most tests give the block one rectangle: values and gradients under the contract that every block must keep.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from cpp_compiler import HAS_COMPILER, NO_COMPILER
from rectangles import PLAIN, RESULTS, Rectangle, check, made_up, run
from ring_rl.kernels import CAUSAL, FULL, Mask, attention
from ring_rl.kernels.local.block import DIAGONAL, EVERYTHING, Demand, Relation, Scoring
from ring_rl.kernels.local.native_cpu import NativeCpuBlock, shares_of_keys
from ring_rl.kernels.local.select import block_named
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.tokens import Cotangents, Keys, Queries

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)

BLOCK = NativeCpuBlock(cores=2)
TILE = 64


MASKS = (
    CAUSAL,
    FULL,
    Mask(causal=True, causal_block_size=40),
    Mask(causal=True, window=70),
    Mask(causal=False, window=50),
    Mask(causal=True, causal_block_size=7, window=90),
)
OPTIONS = (
    (PLAIN, False),
    (Scoring(scale=0.3, soft_cap=3.0, dropout_rate=0.25), True),
    (Scoring(scale=0.3, dropout_rate=0.6), False),
    (Scoring(scale=0.3, soft_cap=0.5), False),
    (PLAIN, True),
)


@st.composite
def rectangles(draw) -> Rectangle:
    B = draw(st.sampled_from([2, 1, 3]))
    # Of one token, of whole tiles, of one token more.
    length = st.one_of(st.integers(1, 300), st.sampled_from([1, TILE, TILE + 1, 4 * TILE, 4 * TILE + 1]))
    scoring, alibi = draw(st.sampled_from(OPTIONS))
    return made_up(
        T=draw(length),
        S=draw(length),
        B=B,
        heads=draw(st.sampled_from([(4, 2), (1, 1), (3, 1), (2, 2)])),
        D=draw(st.sampled_from([20, 1, 64, 80, 128])),
        relation=Relation(draw(st.sampled_from(MASKS))),
        scoring=scoring,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        alibi=alibi,
        packed=draw(st.booleans()),
        # Negative ones too: a block of causality ends below 0.
        first_query=draw(st.integers(-200, 200)),
        first_key=draw(st.integers(-200, 100)),
        stride=draw(st.sampled_from([1, 2, 5])),
        rows=(draw(st.sampled_from([1, B])), draw(st.sampled_from([1, B]))),
        seed=draw(st.integers(0, 2**16)),
    )


# Every example is two small compilations; a smaller failing one is not worth a hundred of them.
@settings(max_examples=40, phases=[Phase.generate])
@given(rectangle=rectangles(), cores=st.integers(1, 5))
def test_any_rectangle_is_as_exact_as_dense_attention_in_float32(rectangle, cores):
    """bfloat16 too: only what comes in is rounded."""
    check(NativeCpuBlock(cores=cores), rectangle)


def test_one_token_of_each():
    check(BLOCK, made_up(T=1, S=1, D=1, heads=(1, 1)))


@pytest.mark.parametrize("value", [0.1, None], ids=["all alike", "random"])
def test_errors_do_not_grow_with_the_number_of_tokens(value):
    """The sum of 65536 values, one after the other in float32, is off by 6e-4 where all are 0.1."""
    many, few = 65536, 3
    draw = lambda n: np.random.default_rng(n).uniform(size=(1, 1, n, 1)).astype(np.float32)  # noqa: E731
    values = draw(many) if value is None else np.full((1, 1, many, 1), value, np.float32)
    # One key stands out: against it all others weigh e^-1, which binary fractions do not hold.
    looks = np.zeros((1, 1, many, 1), np.float32)
    looks[:, :, 5] = 1.0
    ones, positions = np.ones((1, 1, few, 1), np.float32), lambda n: jnp.arange(n, dtype=jnp.int32)[None]
    forward = functools.partial(BLOCK.forward, relation=EVERYTHING, scoring=Scoring(scale=1.0))
    out, lse = forward(Queries(ones, positions(few)), Keys(looks, values, positions(many)))
    weights = np.exp(looks[0, 0, :, 0].astype(np.float64))
    np.testing.assert_allclose(out[0, 0, :, 0], np.average(values[0, 0, :, 0], weights=weights), rtol=1e-5)
    np.testing.assert_allclose(lse, np.log(weights.sum()), rtol=1e-5)

    # Backward the keys' sides are summed over as many queries; and dq over the keys, as above.
    zeros = np.zeros((1, 1, many), np.float32)
    backward = functools.partial(BLOCK.backward, relation=EVERYTHING, scoring=Scoring(scale=1.0))
    keys = Keys(ones, ones, positions(few))
    _, dk, dv = backward(Queries(values, positions(many)), keys, Cotangents(values, zeros + 1, values, zeros))
    x = values[0, 0, :, 0].astype(np.float64)
    np.testing.assert_allclose(dv[0, 0, :, 0], np.sum(np.exp(x - 1) * x), rtol=1e-5)
    np.testing.assert_allclose(dk[0, 0, :, 0], np.sum(np.exp(x - 1) * x * x), rtol=1e-5)
    zeros, keys = zeros[:, :, :few], Keys(values, values, positions(many))
    dq, *_ = backward(Queries(ones, positions(few)), keys, Cotangents(ones, zeros + 1, ones, zeros))
    np.testing.assert_allclose(dq[0, 0, :, 0], np.sum(np.exp(x - 1) * x * x), rtol=1e-5)


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_dropout_drops_what_the_xla_block_drops(rate):
    """With values of ones an output is the share of weights that stayed: equal only if the same ones did."""
    rectangle = made_up(T=130, S=200, B=2, relation=DIAGONAL, scoring=Scoring(scale=0.3, dropout_rate=rate))
    rectangle = dataclasses.replace(rectangle, v=np.ones_like(rectangle.v), d_out=np.ones_like(rectangle.d_out))
    ours, theirs = (run(block, rectangle) for block in (BLOCK, XlaBlock(block_size=TILE)))
    assert np.ptp(ours[0]) > 0
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_rows_with_infinite_log_sum_exp_contribute_nothing():
    rectangle = made_up(T=100, S=70)
    lse = np.full(rectangle.q.shape[:3], np.inf, np.float32)
    for gradient in run(BLOCK, rectangle, lse, np.ones_like(lse)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("options", [{"packed": True}, {"first_query": -500}], ids=["padding", "the past"])
def test_rows_that_see_nothing_are_zero_and_silent_whatever_the_keys_hold(options):
    """Even in a tile that is computed for other rows, where 0 times infinity would be NaN."""
    rectangle = made_up(T=70, S=70, relation=DIAGONAL, **options)
    blind = ~rectangle.seen().any(axis=-1).repeat(2, axis=1)
    assert blind.any()
    values = np.where(rectangle.seen().any(axis=2)[..., None], np.inf, rectangle.v)
    out, lse = run(BLOCK, dataclasses.replace(rectangle, v=values))
    assert (out[blind] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), blind)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_huge_logits(magnitude):
    """Gradients are those of weights that log_sum_exp rounds: an error of 1e4 2^-24, relative."""
    rectangle = made_up(T=100, S=130, relation=Relation(CAUSAL), scoring=Scoring(scale=magnitude))
    truth = rectangle.exact(np.float64)
    lse, delta = truth[1].astype(np.float32), np.ones_like(truth[1], np.float32)
    found = run(BLOCK, rectangle) + run(BLOCK, rectangle, lse, delta)
    assert np.abs(lse).max() > 1e4
    rounding = 4 * np.abs(truth[1]).max() * np.finfo(np.float32).eps
    for ours, expected in zip(found, truth + rectangle.exact(np.float64, lse, delta), strict=True):
        assert np.abs(ours - expected).max() <= rounding * np.abs(expected).max()


def test_very_negative_log_sum_exp_does_not_overflow_what_fills_a_tile():
    """Keys that do not exist score 0; against a log-sum-exp of -1000 their weight would be e^1000."""
    rectangle = made_up(T=5, S=5, heads=(1, 1), scoring=Scoring(scale=1.0))
    q, k = rectangle.q.copy(), rectangle.k.copy()
    q[..., 0], k[..., 0] = 1.0, -1000.0
    rectangle = dataclasses.replace(rectangle, q=q, k=k)
    lse = rectangle.exact(np.float64)[1].astype(np.float32)
    assert (lse < -900).all()
    delta = np.ones_like(lse)
    for ours, expected in zip(run(BLOCK, rectangle, lse, delta), rectangle.exact(np.float64, lse, delta), strict=True):
        assert np.abs(ours - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("too_low", [100, 200, 1e10])
def test_a_log_sum_exp_that_cannot_be_shows(too_low):
    """As in the XLA block: weights of e^100 are infinite, and no finite number that their bits happen to make."""
    rectangle = made_up(T=5, S=5, heads=(1, 1))
    lse = np.full((1, 1, 5), -too_low, np.float32)
    for block in (BLOCK, XlaBlock(block_size=TILE)):
        for gradient in run(block, rectangle, lse, np.zeros_like(lse)):
            assert not np.isfinite(gradient).any()


def _reached(seen: np.ndarray, poisoned: str, at: int) -> dict[str, np.ndarray]:
    """Which rows of each result a broken row of an operand reaches by definition, `seen` being [T, S]."""
    # A row that sees nothing hands on nothing.
    one_row = (np.arange(len(seen)) == at) & seen.any(axis=1)
    rows = one_row if poisoned in ("q", "d_out") else seen[:, at]
    keys, forward = seen[rows].any(axis=0), poisoned != "d_out"
    # What a broken value reaches forward gets back through delta, but the values' gradients hold none of it.
    return {
        "out": rows & forward,
        "lse": rows & (poisoned in ("q", "k")),
        "dq": rows,
        "dk": keys,
        "dv": keys & (poisoned != "v"),
    }


@pytest.mark.parametrize("mask", [CAUSAL, Mask(causal=False, window=30)], ids=["causal", "window"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_broken_shows_where_it_reaches_and_no_further_than_with_the_xla_block(mask, value):
    """Wherever the definition says NaN there is one; beyond that only rows of the same tiles, as in any such block."""
    T = 3 * TILE
    rectangle = made_up(T=T, S=T, heads=(1, 1), relation=Relation(mask), packed=True, seed=3)
    # Positive: an infinite key makes every score infinite, and none of them the other way.
    rectangle = dataclasses.replace(rectangle, q=np.abs(rectangle.q), k=np.abs(rectangle.k))
    assert (~rectangle.seen().any(axis=-1)).any()
    for poisoned in ("q", "k", "v", "d_out"):
        for at in (1, T // 2, T - 1):
            broken = getattr(rectangle, poisoned).copy()
            broken[:, :, at, 3] = value
            one = dataclasses.replace(rectangle, **{poisoned: broken})
            ours = run(BLOCK, one)
            theirs = run(XlaBlock(block_size=TILE), one)
            lse = np.where(np.isneginf(ours[1]), np.inf, ours[1])
            delta = np.einsum("bhtd,bhtd->bht", ours[0], one.d_out)
            ours += run(BLOCK, one, lse, delta)
            theirs += run(XlaBlock(block_size=TILE), one, lse, delta)
            reached = _reached(rectangle.seen()[0, 0], poisoned, at)
            for name, a, b in zip(RESULTS, ours, theirs, strict=True):
                found, there = (np.isnan(x) if name == "lse" else ~np.isfinite(x) for x in (a, b))
                found, there = (x.reshape(T, -1).any(axis=1) for x in (found, there))
                if name == "lse":  # whose NaN the XLA block calls a row that saw nothing
                    np.testing.assert_array_equal(found, reached[name])
                    continue
                assert (found >= reached[name]).all(), f"{poisoned}[{at}]: NaN is hidden in {name}"
                assert (found <= there | reached[name]).all(), f"{poisoned}[{at}]: NaN leaks in {name}"


@pytest.mark.parametrize("cores", [3, 5])
def test_shares_of_keys_change_nothing_but_rounding(cores):
    rectangle = made_up(T=80, S=1300, heads=(1, 1), scoring=Scoring(scale=0.3, soft_cap=3.0))
    assert shares_of_keys(pieces=1, keys=1300, cores=cores) == cores
    lse = np.full((1, 1, 80), 8.0, np.float32)
    shared, alone = (run(NativeCpuBlock(cores=n), rectangle, lse, lse) for n in (cores, 1))
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5, atol=1e-5 * np.abs(alone[0]).max())
    for a, b in zip(shared[1:], alone[1:], strict=True):
        np.testing.assert_array_equal(a, b)


@given(pieces=st.integers(1, 40), keys=st.integers(1, 5000), cores=st.integers(1, 64))
def test_keys_are_shared_no_further_than_there_are_cores_and_stretches(pieces, keys, cores):
    shares = shares_of_keys(pieces=pieces, keys=keys, cores=cores)
    most = max(1, min(cores, -(-keys // 256)))
    assert 1 <= shares <= most
    idle = lambda shares: 1 - pieces * shares / (cores * -(-pieces * shares // cores))  # noqa: E731
    # The fewest that keep nine cores in ten busy.
    assert idle(shares) <= 0.1 or shares == most
    assert all(idle(fewer) > 0.1 for fewer in range(1, shares))


def test_cores_must_be_positive():
    with pytest.raises(ValueError, match="cores must be at least 1, got 0"):
        NativeCpuBlock(cores=0)


def test_two_runs_give_the_same_bits():
    rectangle = made_up(T=300, S=700, heads=(4, 2), scoring=Scoring(scale=0.3, soft_cap=3.0))
    lse = np.full((1, 4, 300), 7.0, np.float32)
    first, *others = ([*run(BLOCK, rectangle), *run(BLOCK, rectangle, lse, lse)] for _ in range(5))
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_axes_of_vmap_are_rows_of_the_batch():
    """One axis, and one within another; operands that an axis does not go over are the same along it."""
    rectangle = made_up(T=70, S=90, B=6, rows=(6, 1), relation=Relation(CAUSAL), packed=True, alibi=True)
    lse = rectangle.exact(np.float32)[1]
    queries, keys, d_out = rectangle.on_device()
    delta = jnp.asarray(np.random.default_rng(0).normal(size=lse.shape), jnp.float32)

    def both(queries, keys, d_out, lse, delta):
        cotangents, options = Cotangents(d_out, lse, d_out, delta), {"relation": Relation(CAUSAL), "scoring": PLAIN}
        forward = BLOCK.forward(queries, keys, **options)
        return (*forward, *BLOCK.backward(queries, keys, cotangents, **options))

    whole = (queries, keys, d_out, jnp.where(jnp.isneginf(lse), jnp.inf, lse), delta)
    expected = jax.jit(both)(*whole)
    shared = Queries(0, 0, 0, None, None), Keys(0, 0, None, 0), 0, 0, 0
    for sizes in [(3,), (3, 2), (2, 3)]:
        split = lambda x, sizes=sizes: x if x.shape[0] == 1 else x.reshape(*sizes, -1, *x.shape[1:])  # noqa: E731
        mapped = both
        for _ in sizes:
            mapped = jax.vmap(mapped, in_axes=shared)
        found = jax.jit(mapped)(*jax.tree.map(split, whole))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("virtual", [False, True], ids=["devices", "virtual"])
def test_a_ring_of_eight(case, virtual):
    """Values and all gradients, log_sum_exp's included; under shard_map with its check on."""
    case(
        axes=(8,),
        layout="zigzag",
        tokens=112,
        packed=True,
        local="native_cpu",
        virtual=virtual,
        soft_cap=6.0,
        alibi=True,
        dropout_rate=0.1,
    ).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_one_device(case, dtype):
    """150 tokens: two tiles and a part of one."""
    case(tokens=150, strategy="blockwise", local="native_cpu", dtype=dtype, heads=(4, 1), head_dim=20).check()


def test_layers_in_a_scan_that_keeps_nothing():
    """Backward calls the block again for every layer; the XLA block's loops are the specification."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 70, 2, 8)), jnp.float32)

    @functools.partial(jax.jit, static_argnames="local")
    def gradient(x, local):
        def loss(x):
            layer = lambda x, _: (attention(x, x, jnp.sin(x), mask=CAUSAL, local=local).out + x, None)  # noqa: E731
            return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer), x, length=3)[0]))

        return jax.grad(loss)(x)

    ours, theirs = gradient(x, "native_cpu"), gradient(x, "xla")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_rows_of_the_batch_over_devices_without_a_ring():
    """Inside `jax.shard_map` with its check on, on devices that all call the block at once."""
    rectangle = made_up(T=70, S=70, B=8, relation=DIAGONAL)
    expected = run(BLOCK, rectangle)
    queries, keys, _ = rectangle.on_device()
    whole = P("rows")

    def forward(q, k, v):
        inner = queries._replace(q=q), keys._replace(k=k, v=v)
        return BLOCK.forward(*inner, relation=DIAGONAL, scoring=PLAIN)

    mesh = DeviceMesh(np.array(jax.devices()), ("rows",))
    mapped = jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=whole, out_specs=whole))
    for a, b in zip(mapped(queries.q, keys.k, keys.v), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda q, k: (q, k._replace(k=k.k[:, :0], v=k.v[:, :0])), "q and k must not be empty"),
        (lambda q, k: (q._replace(positions=q.positions[:0]), k), "positions must be"),
        (lambda q, k: (q._replace(positions=q.positions[:, 1:]), k), "positions must be"),
        (lambda q, k: (q, k._replace(v=k.v[:, :, 1:])), "k and v must be"),
        (lambda q, k: (q._replace(segment_ids=q.positions), k), "segment ids are needed"),
        (lambda q, k: (q._replace(slopes=jnp.ones((1, 3), jnp.float32)), k), "slopes must be"),
    ],
    ids=["no heads", "no positions", "few positions", "few values", "one side's segments", "slopes of other heads"],
)
def test_operands_that_do_not_fit_are_an_error_and_not_the_end_of_the_process(change, complaint):
    queries, keys, _ = made_up(T=5, S=5).on_device()
    with pytest.raises(jax.errors.JaxRuntimeError, match=complaint):
        BLOCK.forward(*change(queries, keys), relation=EVERYTHING, scoring=PLAIN)


def test_float16_is_refused():
    x = jnp.ones((1, 8, 2, 4), jnp.float16)
    with pytest.raises(ValueError, match='computes in float32 or bfloat16, not in float16; local="xla" serves'):
        attention(x, x, x, mask=CAUSAL, local="native_cpu")


def test_a_ring_on_one_machine_sends_as_many_heads_as_each_device_has_cores():
    """A ring's buffers are those of the heads that go round together; a device alone has no ring, and a short shard
    is all latency.
    """
    asked = Demand(
        dtype="float32",
        head_dim=64,
        query_heads=8,
        key_value_heads=8,
        length=2048,
        devices=64,
        relations=(DIAGONAL,),
        segments=False,
        alibi=False,
        scoring=PLAIN,
        log_sum_exp_gradient=False,
    )
    assert block_named("native_cpu", asked, block_size=None) == NativeCpuBlock(cores=1, heads_at_once=1)
    for whole in ({"devices": 1}, {"length": 64}):
        assert block_named("native_cpu", dataclasses.replace(asked, **whole), block_size=None).heads_at_once is None
    with pytest.raises(ValueError, match="heads_at_once must be at least 1, or None for all; got 0"):
        NativeCpuBlock(cores=1, heads_at_once=0)
