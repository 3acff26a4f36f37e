"""Statistics are tested at 4 standard deviations of what independent fair draws would give; seeds are fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels import dropout as dropout_module
from ring_rl.kernels.dropout import Dropout, kept, query_row_bits


def keep_mask(dropout: Dropout, *, batch: int, heads: int, queries, keys) -> np.ndarray:
    """Bool[B H T S]"""
    row_bits = query_row_bits(dropout, positions=jnp.asarray(queries)[None], batch=batch, heads=heads)
    return np.asarray(kept(row_bits[..., None], jnp.asarray(keys), dropout.rate))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of the correlation of independent samples."""
    return float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1] * np.sqrt(a.size))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_rate(rate, seed):
    mask = keep_mask(Dropout(rate, jax.random.key(seed)), batch=2, heads=4, queries=np.arange(256), keys=np.arange(256))
    assert abs(mask.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / mask.size)
    # Nor does any one row or column of weights have its own rate: their counts vary as a binomial's do.
    for axis in (-1, -2):
        counts = mask.sum(axis=axis).reshape(-1)
        variance = 256 * rate * (1 - rate)
        assert abs(counts.var() / variance - 1) < 4 * np.sqrt(2 / counts.size) + 2 / variance


def test_rate_zero_keeps_all():
    assert keep_mask(Dropout(0.0, jax.random.key(0)), batch=1, heads=1, queries=np.arange(64), keys=np.arange(64)).all()


@pytest.mark.parametrize("lag", [1, 2, 16, 64])
@pytest.mark.parametrize("axis", ["queries", "keys", "both", "transposed"])
def test_neighbours_are_independent(axis, lag):
    mask = keep_mask(Dropout(0.3, jax.random.key(5)), batch=2, heads=2, queries=np.arange(512), keys=np.arange(512))
    if axis == "queries":
        score = correlation(mask[..., lag:, :], mask[..., :-lag, :])
    elif axis == "keys":
        score = correlation(mask[..., lag:], mask[..., :-lag])
    elif axis == "both":
        score = correlation(mask[..., lag:, lag:], mask[..., :-lag, :-lag])
    else:  # The pair (p, s + lag) beside (s + lag, p): queries and keys must not play the same part.
        rows, columns = np.triu_indices(512, lag)
        score = correlation(mask[..., rows, columns], mask[..., columns, rows])
    assert abs(score) < 4


def test_rows_heads_and_keys_are_independent():
    positions = np.arange(256)

    def drawn(seed, **first):
        return keep_mask(
            Dropout(0.4, jax.random.key(seed), **first), batch=2, heads=2, queries=positions, keys=positions
        )

    mask = drawn(0)
    assert abs(correlation(mask[0], mask[1])) < 4
    assert abs(correlation(mask[:, 0], mask[:, 1])) < 4
    assert abs(correlation(mask[0, 1], mask[1, 0])) < 4, "row and head must not be interchangeable"
    for other in (1, 2, 2**31):
        assert abs(correlation(mask, drawn(other))) < 4
    raw = [jnp.array(words, jnp.uint32) for words in ([0, 0], [1, 0], [0, 1], [1, 1])]
    masks = [keep_mask(Dropout(0.4, words), batch=1, heads=1, queries=positions, keys=positions) for words in raw]
    assert all(abs(correlation(masks[i], masks[j])) < 4 for i in range(4) for j in range(i))


@pytest.mark.parametrize("name", ["row bits", "weight bits"])
def test_bytes_are_uniform(name):
    """Chi-square of 256 cells: mean 255, standard deviation sqrt(510)."""
    dropout = Dropout(0.5, jax.random.key(11))
    bits = query_row_bits(dropout, positions=jnp.arange(4096)[None], batch=4, heads=4)
    if name == "weight bits":
        key_bits = dropout_module._hash(jnp.arange(4096, dtype=jnp.uint32))
        bits = dropout_module._hash_high(bits[0, 0, :64, None] ^ key_bits)
    # A comparison reads the high bits; the low byte of a product is not expected to be mixed.
    for shift in (24, 16, 8, 0)[: 4 if name == "row bits" else 2]:
        counts = np.bincount(np.asarray(bits >> shift & 0xFF).reshape(-1), minlength=256)
        expected = bits.size / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 4 * np.sqrt(510)


def test_avalanche():
    words = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    hashed = np.asarray(dropout_module._hash(jnp.asarray(words)))
    for bit in range(32):
        flipped = hashed ^ np.asarray(dropout_module._hash(jnp.asarray(words ^ np.uint32(1 << bit))))
        share = np.unpackbits(flipped.view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
        assert np.abs(share - 0.5).max() < 0.004 + 4 * 0.5 / 2**8


@given(
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
    rate=st.sampled_from([0.1, 0.5]),
)
def test_any_part_equals_that_part_of_the_whole(data, seed, rate):
    """Rows, heads, queries and keys in any share and any order, compiled or not."""
    B, H, T, S = 3, 4, 12, 10
    key = jax.random.key(seed)
    whole = keep_mask(Dropout(rate, key), batch=B, heads=H, queries=np.arange(T), keys=np.arange(S))
    row, head = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, H - 1))
    queries, keys = np.array(data.draw(st.permutations(range(T)))), np.array(data.draw(st.permutations(range(S))))
    shares = Dropout(rate, key, first_row=jnp.int32(row), first_head=jnp.int32(head))

    @jax.jit
    def part(dropout, queries, keys):
        row_bits = query_row_bits(dropout, positions=queries[None], batch=B - row, heads=H - head)
        # Keys first, as a kernel that holds scores transposed does.
        return kept(row_bits[..., None, :], keys[:, None], dropout.rate)

    np.testing.assert_array_equal(part(shares, queries, keys).mT, whole[row:, head:][:, :, queries][..., keys])


def test_positions_of_each_row():
    dropout = Dropout(0.5, jax.random.key(1))
    positions = jnp.array([[0, 1, 2], [7, 5, 1]])
    bits = query_row_bits(dropout, positions=positions, batch=2, heads=2)
    every = query_row_bits(dropout, positions=jnp.arange(8)[None], batch=2, heads=2)
    np.testing.assert_array_equal(bits[0], every[0][:, positions[0]])
    np.testing.assert_array_equal(bits[1], every[1][:, positions[1]])


def test_kinds_of_key():
    positions = jnp.arange(8)[None]

    def bits(key):
        return np.asarray(query_row_bits(Dropout(0.5, key), positions=positions, batch=1, heads=1))

    np.testing.assert_array_equal(bits(jax.random.key(3)), bits(jax.random.PRNGKey(3)))
    assert bits(jax.random.key(3, impl="rbg")).shape == (1, 1, 8)


def test_is_a_pytree_with_a_static_rate():
    dropout = Dropout(0.25, jax.random.key(0), first_row=2)
    leaves, structure = jax.tree.flatten(dropout)
    assert len(leaves) == 3
    assert jax.tree.unflatten(structure, leaves) == dropout
    assert jax.jit(lambda d: d)(dropout).rate == 0.25


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_refuses_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match=r"dropout rate must be in \[0, 1\), got"):
        Dropout(rate, jax.random.key(0))


def test_refuses_several_keys_and_misfit_positions():
    with pytest.raises(ValueError, match=r"dropout needs one key, got keys of shape \(2,\)"):
        keep_mask(Dropout(0.5, jax.random.split(jax.random.key(0))), batch=1, heads=1, queries=[0], keys=[0])
    with pytest.raises(ValueError, match="positions of 2 rows do not fit a batch of 3; give 1 row or 3"):
        query_row_bits(Dropout(0.5, jax.random.key(0)), positions=jnp.zeros((2, 4), jnp.int32), batch=3, heads=1)
