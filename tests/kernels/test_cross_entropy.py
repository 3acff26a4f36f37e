from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_rl.kernels.cross_entropy import CrossEntropySums, blockwise_cross_entropy

IGNORED = -100


def random_batch(seed, *, shape=(2, 48), width=8, vocabulary=30, dtype=np.float32, spread=2.0):
    """(hidden, head, bias, weights) that have gradients, and targets, some of them to be ignored."""
    generator = np.random.default_rng(seed)
    hidden, head, bias = (
        (spread * generator.normal(size=size)).astype(dtype)
        for size in ((*shape, width), (width, vocabulary), (vocabulary,))
    )
    weights = (generator.uniform(0.5, 2, shape) * (generator.random(shape) < 0.8)).astype(np.float32)
    targets = generator.integers(0, vocabulary, shape).astype(np.int32)
    targets[generator.random(shape) < 0.1] = IGNORED
    return (hidden, head, bias, weights), targets


def dense(hidden, head, bias, weights, targets, *, soft_cap=None, z_loss=0.0):
    """The formula, in the dtype of its inputs, with all logits at once."""
    seen = (targets >= 0) & (targets < head.shape[1]) & (weights != 0)
    weights = jnp.where(seen, weights, 0).astype(hidden.dtype)
    logits = hidden @ head + bias
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, jnp.clip(targets, 0)[..., None], axis=-1)[..., 0]
    penalty = z_loss * log_sum_exp**2
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(hidden.dtype)
    loss = log_sum_exp - target_logit + penalty
    return CrossEntropySums(*(jnp.sum(weights * x) for x in (loss, jnp.ones_like(loss), correct, penalty)))


def ours(hidden, head, bias, weights, targets, **options):
    return blockwise_cross_entropy(hidden, head, targets, weights=weights, bias=bias, **options)


def mean_sums_and_gradients(function, parameters, targets):
    def mean(*parameters):
        sums = function(*parameters, targets)
        return sums.mean(), sums

    (value, sums), gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3), has_aux=True))(*parameters)
    return value, sums, gradients


def exact(function, parameters, targets):
    with jax.enable_x64(True):
        result = mean_sums_and_gradients(function, tuple(np.asarray(x, np.float64) for x in parameters), targets)
        return jax.tree.map(np.asarray, result)


def error(got, expected):
    """Largest difference, relative to the largest entry."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)


@settings(max_examples=8)  # every example is a compilation of its own
@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 6, 48]),
    chunks=st.sampled_from([1, 2, 3, 48]),
    vocabulary=st.sampled_from([1, 2, 33]),
    soft_cap=st.sampled_from([None, 3.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([np.float32, jnp.bfloat16]),
)
def test_values_and_gradients_are_as_good_as_the_naive_ones(seed, tokens, chunks, vocabulary, soft_cap, z_loss, dtype):
    chunks = chunks if tokens % chunks == 0 else 1
    parameters, targets = random_batch(seed, shape=(2, tokens), vocabulary=vocabulary, dtype=dtype)
    options = {"soft_cap": soft_cap, "z_loss": z_loss}
    expected = exact(partial(dense, **options), parameters, targets)
    naive = mean_sums_and_gradients(partial(dense, **options), parameters, targets)
    got = mean_sums_and_gradients(partial(ours, chunks=chunks, **options), parameters, targets)
    rounding = 1e-5 if dtype == np.float32 else 2**-8
    # Rounded logits can be equal, or a little the other way round, and then the most likely token is another.
    results = [(mean, sums._replace(correct_sum=0.0), gradients) for mean, sums, gradients in (got, naive, expected)]
    for value, naive_value, exact_value in zip(*map(jax.tree.leaves, results), strict=True):
        assert error(value, exact_value) <= 2 * error(naive_value, exact_value) + rounding
    assert all(x.dtype == jnp.float32 for x in got[1])
    assert [x.dtype for x in got[2]] == [x.dtype for x in parameters]
    if dtype == np.float32 and soft_cap is None:
        np.testing.assert_allclose(got[1].correct_sum, expected[1].correct_sum, rtol=1e-5)


def test_extreme_logits():
    parameters, targets = random_batch(0, spread=100.0)
    value, sums, gradients = mean_sums_and_gradients(partial(ours, chunks=4), parameters, targets)
    expected_value, expected_sums, expected_gradients = exact(dense, parameters, targets)
    assert expected_value > 1e4
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        assert error(got, expected) < 1e-4


def over_tokens(ring_size, **options):
    """The loss in shard_map, over tokens that are sharded on an axis and batches on another."""
    mesh = Mesh(np.array(jax.devices()[: 2 * ring_size]).reshape(2, ring_size), ("dp", "sp"))
    tokens = P("dp", "sp")
    return jax.shard_map(
        partial(ours, axis_name=("dp", "sp"), **options),
        mesh=mesh,
        in_specs=(tokens, P(), P(), tokens, tokens),
        out_specs=P(),
    )


@pytest.mark.parametrize("ring_size", [1, 4])
def test_sharded_tokens_give_the_mean_over_all_tokens(ring_size):
    parameters, targets = random_batch(1)
    options = {"soft_cap": 20.0, "z_loss": 1e-2, "chunks": 3}
    expected = mean_sums_and_gradients(partial(ours, **options), parameters, targets)
    got = mean_sums_and_gradients(over_tokens(ring_size, **options), parameters, targets)
    for value, expected_value in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert error(value, expected_value) < 2e-6


def test_gradients_may_be_taken_inside_shard_map():
    parameters, targets = random_batch(2)
    _, _, expected = mean_sums_and_gradients(partial(ours, chunks=3), parameters, targets)

    def gradients(*arguments):
        mean = lambda *p: ours(*p, arguments[-1], chunks=3, axis_name="sp").mean()  # noqa: E731
        return jax.grad(mean, argnums=(0, 1, 2, 3))(*arguments[:-1])

    mesh, tokens = Mesh(np.array(jax.devices()[:8]), ("sp",)), P(None, "sp")
    specs = (tokens, P(), P(), tokens)
    run = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=(*specs, tokens), out_specs=specs))
    for got, wanted in zip(run(*parameters, targets), expected, strict=True):
        assert error(got, wanted) < 2e-6


def test_a_virtual_ring_sums_alike():
    parameters, targets = random_batch(3)
    expected = mean_sums_and_gradients(partial(ours, chunks=3), parameters, targets)

    def whole(hidden, head, bias, weights, targets):
        split = lambda x: x.reshape(2, 4, 12, *x.shape[2:])  # noqa: E731
        run = jax.vmap(partial(ours, chunks=3, axis_name="sp"), in_axes=(1, None, None, 1, 1), axis_name="sp")
        return jax.tree.map(lambda x: x[0], run(split(hidden), head, bias, split(weights), split(targets)))

    got = mean_sums_and_gradients(whole, parameters, targets)
    for value, wanted in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert error(value, wanted) < 2e-6


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inside", ["jit", "shard_map"])
def test_logits_of_all_tokens_never_exist_and_no_token_moves(inside, dtype, differentiate):
    tokens, width, vocabulary, ring_size = 2048, 8, 512, 4
    mesh = Mesh(np.array(jax.devices()[:ring_size]), ("sp",))
    over_ring = NamedSharding(mesh, P(None, "sp"))
    hidden = jax.ShapeDtypeStruct((1, tokens, width), dtype, sharding=over_ring)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=over_ring)
    head = jax.ShapeDtypeStruct((width, vocabulary), dtype, sharding=NamedSharding(mesh, P()))

    def compiled(chunks):
        def mean(hidden, head, targets):
            if inside == "jit":
                return blockwise_cross_entropy(hidden, head, targets, chunks=chunks).mean()
            function = partial(blockwise_cross_entropy, chunks=chunks, axis_name="sp")
            specs = (P(None, "sp"), P(), P(None, "sp"))
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P())(hidden, head, targets).mean()

        function = jax.value_and_grad(mean, argnums=(0, 1)) if differentiate else mean
        return jax.jit(function).lower(hidden, head, targets).compile()

    logits_bytes = tokens // ring_size * vocabulary * 4
    in_steps = compiled(32)
    assert compiled(1).memory_analysis().temp_size_in_bytes >= logits_bytes  # what the measure shows of them
    assert in_steps.memory_analysis().temp_size_in_bytes < logits_bytes / 4
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in in_steps.as_text()


def test_the_gradient_of_the_head_is_summed_over_devices_once():
    parameters, targets = random_batch(1)
    run = jax.grad(lambda *p: over_tokens(4, chunks=3)(*p, targets).mean(), argnums=1)
    program = jax.jit(run).lower(*parameters).compile().as_text()
    before_main, main = program.split("ENTRY")
    assert "all-reduce" in main
    assert "all-reduce(" not in before_main


def test_gradients_cost_three_products():
    parameters, targets = random_batch(1)
    run = jax.grad(lambda *p: ours(*p, targets, chunks=3).mean(), argnums=(0, 1))
    assert jax.jit(run).lower(*parameters).as_text().count("stablehlo.dot_general") == 3


def test_without_any_weight_everything_is_zero():
    (hidden, head, bias, weights), targets = random_batch(4)
    for nothing in ((weights * 0, targets), (weights, targets * 0 + IGNORED), (weights, targets * 0 + head.shape[1])):
        value, sums, gradients = mean_sums_and_gradients(
            partial(ours, chunks=2, z_loss=0.1), (hidden, head, bias, nothing[0]), nothing[1]
        )
        assert value == 0
        assert all((x == 0).all() for x in (*sums, *gradients))


def test_ignored_tokens_may_hold_anything():
    (hidden, head, bias, weights), targets = random_batch(5)
    ignored = (weights == 0) | (targets == IGNORED)
    assert 0 < ignored.sum() < ignored.size
    run = partial(mean_sums_and_gradients, partial(ours, chunks=4, z_loss=0.1))
    expected = run((hidden, head, bias, weights), targets)
    spoiled = np.where(ignored[..., None], np.float32(np.nan), hidden)
    got = run((spoiled, head, bias, weights), np.where(ignored, 10**6, targets))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_perplexity_is_of_the_likelihood_alone():
    parameters, targets = random_batch(6)
    plain, penalised = (ours(*parameters, targets, chunks=1, z_loss=z_loss) for z_loss in (0.0, 0.5))
    assert penalised.z_loss_sum > 1
    np.testing.assert_allclose(penalised.loss_sum - penalised.z_loss_sum, plain.loss_sum, rtol=1e-5)


def test_equal_logits_make_the_first_token_the_most_likely():
    sums = blockwise_cross_entropy(jnp.ones((4, 3)), jnp.zeros((3, 5)), jnp.arange(4), chunks=2)
    assert sums.correct_sum == 1
    np.testing.assert_allclose(sums.mean(), np.log(5), rtol=1e-6)


def test_defaults_are_weights_of_one_and_no_bias_and_a_mask_is_weights():
    (hidden, head, bias, _), _ = random_batch(7)
    targets = np.random.default_rng(0).integers(0, head.shape[1], hidden.shape[:2])
    plain = blockwise_cross_entropy(hidden, head, targets, chunks=4)
    ones = ours(hidden, head, bias * 0, np.ones(targets.shape, bool), targets, chunks=4)
    flat = blockwise_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets.ravel(), chunks=4)
    np.testing.assert_allclose(plain, ones, rtol=1e-6)
    np.testing.assert_allclose(plain, flat, rtol=1e-5)
    assert plain.weight_sum == targets.size


def test_bad_calls_are_refused_with_the_remedy():
    (hidden, head, bias, weights), targets = random_batch(0)
    with pytest.raises(ValueError, match="48 tokens cannot be cut into 5 cross-entropy chunks"):
        blockwise_cross_entropy(hidden, head, targets, chunks=5)
    with pytest.raises(ValueError, match="pass the transpose of an embedding table"):
        blockwise_cross_entropy(hidden, head.T, targets, chunks=1)
    with pytest.raises(ValueError, match=r"targets \(2, 47\) must be one a token, \(2, 48\)"):
        blockwise_cross_entropy(hidden, head, targets[:, 1:], chunks=1)
    with pytest.raises(ValueError, match=r"weights \(1, 48\) must be one a token"):
        blockwise_cross_entropy(hidden, head, targets, weights=weights[:1], chunks=1)
    with pytest.raises(ValueError, match=r"bias \(29,\) must be one a token of the vocabulary, \(30,\)"):
        blockwise_cross_entropy(hidden, head, targets, bias=bias[1:], chunks=1)
    with pytest.raises(ValueError, match="soft_cap must be positive, got 0"):
        blockwise_cross_entropy(hidden, head, targets, soft_cap=0, chunks=1)
    with pytest.raises(ValueError, match="z_loss must not be negative, got -1"):
        blockwise_cross_entropy(hidden, head, targets, z_loss=-1, chunks=1)
