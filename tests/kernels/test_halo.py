import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.halo import check_halo, chunks_with_previous, lagged, previous_tokens
from ring_rl.kernels.layout import chunks_per_device, permutation


def on_virtual_ring(function, x, *, ring_size, layout):
    """function of each device's tokens, all devices' results joined in natural order."""
    order = permutation(x.shape[1], ring_size=ring_size, layout=layout)
    shards = jnp.stack(jnp.split(jnp.asarray(x)[:, order], ring_size, axis=1))
    out = jnp.concatenate(list(jax.vmap(function, axis_name="sp")(shards)), axis=1)
    return np.asarray(out)[:, np.argsort(order)]


@given(
    ring_size=st.integers(1, 5),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    chunk=st.integers(1, 5),
    lag=st.integers(0, 5),
    data=st.data(),
)
def test_every_token_finds_the_one_before_it(ring_size, layout, chunk, lag, data):
    """Whatever the ring: the token `lag` back is that of the whole sequence, and the fill before its first."""
    tokens = ring_size * chunks_per_device(layout) * chunk
    count = data.draw(st.integers(max(lag, 1), 5)) if ring_size == 1 else data.draw(st.integers(1, chunk))
    lag = min(lag, count)
    x = np.arange(2 * tokens * 3).reshape(2, tokens, 3)

    def back(x):
        chunks = chunks_with_previous(x, count, layout=layout, axis_name="sp", fill=-7)
        return lagged(chunks, lag, count=count)

    before = np.full((2, lag, 3), -7)
    expected = np.concatenate([before, x], axis=1)[:, :tokens]
    np.testing.assert_array_equal(on_virtual_ring(back, x, ring_size=ring_size, layout=layout), expected)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_gradients_go_back_to_the_token_that_was_read(layout):
    x = np.ones((1, 16, 1), np.float32)
    weights = np.arange(16, dtype=np.float32)[None, :, None]
    order = permutation(16, ring_size=4, layout=layout)

    def loss(x):
        shards = jnp.stack(jnp.split(x[:, order], 4, axis=1))
        chunks = jax.vmap(
            lambda x: lagged(chunks_with_previous(x, 2, layout=layout, axis_name="sp", fill=0), 2, count=2),
            axis_name="sp",
        )
        return jnp.sum(jnp.concatenate(list(chunks(shards)), axis=1) * weights[:, order])

    # Token t is read by t + 2, which is weighed by its own number; the last two are read by nobody.
    expected = np.concatenate([np.arange(2, 16), [0, 0]]).astype(np.float32)
    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(x))[0, :, 0], expected)


def test_without_an_axis_the_sequence_is_whole():
    x = jnp.arange(6).reshape(1, 6)
    before = previous_tokens(x, 4, layout="zigzag", axis_name=None, fill=-1)
    np.testing.assert_array_equal(before, [[[-1] * 4]])


def test_what_has_no_neighbour_is_refused():
    check_halo(8, 4, layout="zigzag", ring_size=2)
    check_halo(1, 4, layout="striped", ring_size=1)
    with pytest.raises(ValueError, match=r"layout=striped tears neighbouring tokens apart.* use layout=zigzag"):
        check_halo(8, 4, layout="striped", ring_size=2)
    with pytest.raises(ValueError, match="strategy=hybrid shares a sequence over two axes"):
        check_halo(8, 4, layout="zigzag", ring_size=4, axes=("sp_ring", "sp_ulysses"))
    with pytest.raises(ValueError, match=r"chunks of 4 tokens are shorter than the 6 .* at least 24 tokens or fewer"):
        check_halo(8, 6, layout="zigzag", ring_size=2)
