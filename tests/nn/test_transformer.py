import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_rl.kernels.layout import permutation


@pytest.fixture(scope="module")
def one_device(transformers):
    """What one device computes, for each choice of model and segments; made once."""
    made = {}

    def results(*, packed=False, **changes):
        key = (packed, *sorted(changes.items()))
        if key not in made:
            segment_ids = transformers.segments() if packed else None
            made[key] = transformers.outputs_and_gradients(
                transformers.make(**changes), transformers.parallel(1, 1, 1, 1), segment_ids=segment_ids
            )
        return made[key]

    return results


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 2, 2, 2), {}),
        ((1, 1, 4, 2), {"layout": "contiguous"}),
        ((1, 1, 1, 8), {}),
        ((4, 1, 1, 2), {"layout": "striped", "strategy": "auto"}),
        ((2, 1, 1, 4), {"strategy": "ulysses"}),
        ((1, 2, 1, 4), {"weight_axes": ("fsdp", "sp")}),
        ((1, 1, 2, 4), {"strategy": "hybrid", "ulysses_size": 2, "weight_axes": ("fsdp", "sp")}),
        ((1, 2, 1, 4), {"strategy": "all_gather"}),
        ((1, 2, 2, 1), {"strategy": "dense"}),
    ],
)
def test_every_mesh_and_strategy_gives_what_one_device_gives(transformers, one_device, sizes, options):
    heads = {"query_heads": 4, "key_value_heads": 4}
    got = transformers.outputs_and_gradients(transformers.make(**heads), transformers.parallel(*sizes, **options))
    transformers.assert_close(got, one_device(**heads))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((1, 2, 1, 4), {}), ((2, 1, 2, 2), {"layout": "contiguous"}), ((1, 1, 1, 4), {"strategy": "ulysses"})],
)
def test_packed_documents_under_a_window(transformers, one_device, sizes, options):
    model = transformers.make(attention_window=9)
    around = transformers.parallel(*sizes, **options)
    got = transformers.outputs_and_gradients(model, around, segment_ids=transformers.segments())
    transformers.assert_close(got, one_device(packed=True, attention_window=9))


def test_documents_and_windows_hide(transformers, one_device):
    """Gradients say what a token saw."""
    plain, window = one_device(), one_device(attention_window=9)
    np.testing.assert_allclose(plain[0][:, :9], window[0][:, :9], atol=1e-5)
    assert np.abs(plain[0][:, 9:] - window[0][:, 9:]).max(axis=-1).min() > 1e-3
    model, around = transformers.make(attention_window=3), transformers.parallel(1, 1, 1, 1)
    x, positions = transformers.inputs()
    graphdef, parameters = nnx.split(model)

    def seen(x):
        out = nnx.merge(graphdef, parameters)(x, positions, around, segment_ids=transformers.segments())
        return jnp.sum(out[0, transformers.tokens // 2 + 1] ** 2)

    # Two layers of a window of 3 reach 4 tokens back; the document began one token back.
    reached = np.abs(jax.jit(jax.grad(seen))(jnp.asarray(x))[0]).max(axis=-1) > 0
    assert np.flatnonzero(reached).tolist() == [transformers.tokens // 2, transformers.tokens // 2 + 1]


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("window", [None, 7])
def test_decoding_gives_what_the_whole_sequence_gives(transformers, one_device, chunk, window):
    model = transformers.make(attention_window=window)
    x, _ = transformers.inputs()
    decode = nnx.jit(lambda model, x, cache: model.decode(x, cache))
    cache, pieces = model.empty_cache(batch=transformers.batch, capacity=transformers.tokens), []
    for start in range(0, transformers.tokens, chunk):
        out, cache = decode(model, x[:, start : start + chunk], cache)
        pieces.append(out)
    assert int(cache.length) == transformers.tokens == cache.capacity
    expected = one_device(attention_window=window)[0]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5)


def test_bfloat16_computes_near_float32_and_keeps_parameters_and_gradients_in_it(transformers, one_device):
    changes = {"compute_dtype": "bfloat16", "feed_forward_chunks": 2}
    model, around = transformers.make(**changes), transformers.parallel(1, 2, 2, 2)
    loss, arguments, _ = transformers.loss_function(model, around)
    _, out = jax.eval_shape(loss, *arguments)
    assert out.dtype == jnp.bfloat16
    assert model.empty_cache(batch=1, capacity=1).layers[0].k.dtype == jnp.bfloat16
    got, expected = transformers.outputs_and_gradients(model, around), one_device()
    assert {x.dtype for x in jax.tree.leaves((arguments[0], got[1]))} == {np.dtype(np.float32)}
    error = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)  # noqa: E731
    errors = jax.tree.leaves(jax.tree.map(error, got, expected))
    assert 1e-4 < max(errors) < 0.05


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_feed_forward_chunks_change_nothing(transformers, one_device, sizes):
    got = transformers.outputs_and_gradients(transformers.make(feed_forward_chunks=4), transformers.parallel(*sizes))
    transformers.assert_close(got, one_device())


def test_layers_without_positions_are_told_apart_by_a_flag_of_the_scan(transformers, one_device):
    """Each of the two alone, and both, which is as if nothing ever turned."""
    first, last = one_device(no_position_layers=(0,)), one_device(no_position_layers=(1,))
    none = one_device(rotary_fraction=0.0)
    np.testing.assert_allclose(one_device(no_position_layers=(0, 1))[0], none[0], atol=1e-6)
    outs = one_device()[0], first[0], last[0], none[0]
    for index, out in enumerate(outs):
        for other in outs[:index]:
            assert np.abs(out - other).max() > 1e-3


def test_bad_sizes_name_the_rule(transformers):
    config = transformers.config
    with pytest.raises(ValueError, match=r"query_heads=4 must be a multiple of key_value_heads=3"):
        config(key_value_heads=3)
    with pytest.raises(ValueError, match=r"head_dim=5 times rotary_fraction=1.0 must be even"):
        config(head_dim=5)
    with pytest.raises(ValueError, match=r"transformer.layers must be at least 1, got 0"):
        config(layers=0)
    with pytest.raises(ValueError, match=r"attention_window must be at least 1 .*, got 0; null is no window"):
        config(attention_window=0)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_traced(transformers):
    config, size = transformers.config, {"batch": 4, "length": 32}
    config().check(transformers.parallel(1, 2, 2, 2), **size)
    with pytest.raises(ValueError, match=r"batch of 3 .* fsdp=2"):
        config().check(transformers.parallel(1, 2, 2, 2), batch=3, length=32)
    with pytest.raises(ValueError, match=r"key_value_heads=2 cannot be shared by tp=4"):
        config().check(transformers.parallel(1, 1, 4, 2), **size)
    with pytest.raises(ValueError, match=r"feed_forward_width=33 cannot be shared by tp=2"):
        config(feed_forward_width=33).check(transformers.parallel(1, 1, 2, 1), **size)
    with pytest.raises(ValueError, match=r"8 tokens cannot be cut into 3 feed-forward chunks"):
        config(feed_forward_chunks=3).check(transformers.parallel(1, 1, 1, 4), **size)
    x, positions = transformers.inputs()
    with pytest.raises(ValueError, match=r"sequence length 32 is not divisible .* zigzag ring of size 3; pad to 36"):
        transformers.make()(x, positions, transformers.parallel(1, 1, 1, 3))


def test_layers_are_told_the_layout(transformers):
    """Where the order of tokens is another than was said, the result is another: positions come from the layout."""
    around = transformers.parallel(1, 1, 1, 2)
    model, (x, positions) = transformers.make(), transformers.inputs()
    order = permutation(transformers.tokens, ring_size=2, layout="zigzag")
    graphdef, parameters = nnx.split(model)
    run = jax.jit(lambda x, positions: nnx.merge(graphdef, jax.device_get(parameters))(x, positions, around))
    right, wrong = run(x[:, order], positions[:, order]), run(x, positions)
    assert np.abs(np.asarray(right) - np.asarray(wrong)[:, order]).max() > 1e-2
