import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.mask import CAUSAL, FULL, Mask, visible

windows = st.one_of(st.none(), st.integers(1, 12))
masks = st.one_of(
    st.builds(Mask, causal=st.just(True), causal_block_size=st.integers(1, 6), window=windows),
    st.builds(Mask, causal=st.just(False), window=windows),
)


def sees(mask: Mask, p: int, s: int, a: int, b: int) -> bool:
    """The rule of the module's docstring, for one query at p in segment a and one key at s in segment b."""
    if mask.causal and s // mask.causal_block_size > p // mask.causal_block_size:
        return False
    if mask.window is not None and p - s >= mask.window:
        return False
    if mask.window is not None and not mask.causal and s - p >= mask.window:
        return False
    return a == b and a >= 0


@given(mask=masks, packed=st.booleans(), seed=st.integers(0, 999))
def test_visible_is_the_rule_for_every_pair(mask, packed, seed):
    """Positions in any order, and of each row of a batch."""
    rng = np.random.default_rng(seed)
    B, T, S = 2, 7, 9
    p, s = rng.integers(0, 30, (B, T)), rng.integers(0, 30, (B, S))
    a, b = (rng.integers(-1, 2, shape) if packed else np.zeros(shape, int) for shape in ((B, T), (B, S)))
    shown = visible(mask, p, s, *((a, b) if packed else ()))
    assert shown.shape == (B, T, S)
    for row, t, key in np.ndindex(B, T, S):
        assert shown[row, t, key] == sees(mask, p[row, t], s[row, key], a[row, t], b[row, key])


def test_visible_as_drawn():
    def drawn(mask, segments=None):
        positions = np.arange(4)
        shown = visible(mask, positions, positions, segments, segments)
        return ["".join(".x"[int(seen)] for seen in row) for row in shown]

    assert drawn(CAUSAL) == ["x...", "xx..", "xxx.", "xxxx"]
    assert drawn(Mask(causal=True, causal_block_size=2)) == ["xx..", "xx..", "xxxx", "xxxx"]
    assert drawn(Mask(causal=True, window=2)) == ["x...", "xx..", ".xx.", "..xx"]
    assert drawn(Mask(causal=False, window=2)) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert drawn(CAUSAL, np.array([0, 0, 1, -1])) == ["x...", "xx..", "..x.", "...."]


def test_positions_shared_by_the_batch_meet_segments_of_each_row():
    segments = np.array([[0, 0, 1], [0, 1, 1]])
    positions = np.arange(3)[None]
    shown = visible(CAUSAL, positions, positions, segments, segments)
    assert shown.shape == (2, 3, 3)
    assert shown[:, 1, 0].tolist() == [True, False]


@given(mask=masks)
def test_what_a_mask_says_of_itself(mask):
    """`reach` is the furthest that any query sees; `needs_positions` unless position hides nothing."""
    length = 40
    positions = np.arange(length)
    shown = np.asarray(visible(mask, positions, positions))
    t, s = np.nonzero(shown)
    back, ahead = mask.reach()
    assert (t - s).max() == (length - 1 if back is None else back)
    assert (s - t).max() == (length - 1 if ahead is None else ahead)
    assert mask.needs_positions == (not shown.all())


def test_constants():
    assert (FULL.causal, FULL.causal_block_size, FULL.window) == (False, 1, None)
    assert (CAUSAL.causal, CAUSAL.causal_block_size, CAUSAL.window) == (True, 1, None)
    assert Mask(causal=True) == CAUSAL, "equal masks must be equal compile-time constants"
    assert hash(Mask(causal=True)) == hash(CAUSAL)


@pytest.mark.parametrize("size", [0, -3])
def test_refuses_empty_blocks_and_windows(size):
    with pytest.raises(ValueError, match=f"causal_block_size must be at least 1 token, got {size}"):
        Mask(causal=True, causal_block_size=size)
    with pytest.raises(ValueError, match=rf"window must be at least 1 token \(the query's own\), got {size}"):
        Mask(causal=True, window=size)


def test_refuses_blocks_without_causality_and_half_the_segments():
    with pytest.raises(ValueError, match="causal_block_size=4 means nothing without causal=True"):
        Mask(causal=False, causal_block_size=4)
    positions = np.arange(3)
    with pytest.raises(ValueError, match="segment ids are needed for queries and keys alike, or for neither"):
        visible(FULL, positions, positions, query_segments=np.zeros(3, int))
