"""Tiles: whatever is computed without a mask is visible in full, and whatever is never computed is not visible."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.kernels.local.block import DIAGONAL, Relation
from ring_rl.kernels.local.tiles import Bounds, Tiling, bounds, visible_tiles
from ring_rl.kernels.mask import FULL, Mask, visible
from ring_rl.kernels.tokens import Keys, Queries

EXAMPLES = settings(max_examples=60)

masks = st.one_of(
    st.builds(
        Mask,
        causal=st.just(True),
        causal_block_size=st.integers(1, 5),
        window=st.none() | st.integers(1, 12),
    ),
    st.builds(Mask, causal=st.just(False), window=st.none() | st.integers(1, 12)),
)
lengths = st.integers(1, 17)


@given(length=st.integers(1, 1000), largest=st.integers(1, 300))
def test_tilings_are_whole_even_and_few(length, largest):
    tiling = Tiling.of(length, largest)
    assert tiling.size <= largest
    assert tiling.count == -(-length // largest)
    assert tiling.count * tiling.size - tiling.padding == length
    assert 0 <= tiling.padding < tiling.count, "no tile is shorter than another by more than rounding costs"
    assert (tiling.count - 1) * tiling.size < length, "no tile is all padding"


def rectangle(T, S, *, positions=None, segments=None) -> tuple[Queries, Keys]:
    """Queries and keys of no interest but for where they stand."""
    p, s = (jnp.arange(T)[None], jnp.arange(S)[None]) if positions is None else map(jnp.asarray, positions)
    a, b = (None, None) if segments is None else map(jnp.asarray, segments)
    q, k = jnp.zeros((1, 1, T, 1)), jnp.zeros((1, 1, S, 1))
    return Queries(q, p, a), Keys(k, k, s, b)


def visible_in_numpy(mask, p, s) -> np.ndarray:
    """The formulas of `Mask` once more, without a compilation for every shape."""
    p, s = p[:, None], s[None]
    shown = np.ones(np.broadcast_shapes(p.shape, s.shape), bool)
    if mask.causal:
        shown &= s // mask.causal_block_size <= p // mask.causal_block_size
    if mask.window is not None:
        shown &= (p - s < mask.window) & (mask.causal | (s - p < mask.window))
    return shown


def dense_by_tile(shown, rows: Tiling, columns: Tiling):
    """(whether anybody sees anybody, whether everybody sees everybody) in each tile; what is padded sees nothing."""
    padded = np.pad(np.asarray(shown), ((0, 0), (0, rows.padding), (0, columns.padding)))
    tiles = padded.reshape(-1, rows.count, rows.size, columns.count, columns.size)
    # Queries that do not exist matter to nobody: only keys must be whole for a tile to be open.
    exists = np.pad(np.ones(shown.shape[1], bool), (0, rows.padding)).reshape(rows.count, rows.size)
    seen = tiles | ~exists[None, :, :, None, None]
    return np.asarray(np.any(tiles, axis=(2, 4))), np.asarray(np.all(seen, axis=(2, 4)))


def assert_sound(found: Bounds, anybody, everybody):
    """Of one row of the batch: every visible pair is reached, every tile that goes unmasked is open."""
    index = np.arange(anybody.shape[-1])
    first, open_first, open_stop, stop = (np.asarray(x)[:, None] for x in found)
    assert (first <= open_first).all()
    assert (open_first <= open_stop).all()
    assert (open_stop <= stop).all()
    assert not (anybody & ~((first <= index) & (index < stop))).any(), "a visible tile is skipped"
    assert not (~everybody & (open_first <= index) & (index < open_stop)).any(), "a tile in need of a mask has none"


@EXAMPLES
@given(T=lengths, S=lengths, tile=st.integers(1, 9), mask=masks, offset=st.integers(-6, 30))
def test_known_offsets_waste_nothing(T, S, tile, mask, offset):
    """Reachable is exactly what anybody sees, open exactly what everybody sees, and all of it is known at once."""
    # Where causality goes by blocks, an offset says besides that key 0 begins one.
    queries, keys = rectangle(T, S)
    rows, columns = Tiling.of(T, tile), Tiling.of(S, tile)
    reachable, is_open = visible_tiles(queries, keys, relation=Relation(mask, offset), rows=rows, columns=columns)
    assert isinstance(reachable, np.ndarray)
    assert isinstance(is_open, np.ndarray)
    shown = np.asarray(visible_in_numpy(mask, offset + np.arange(T), np.arange(S))[None])
    anybody, everybody = (x[0] for x in dense_by_tile(shown, rows, columns))
    np.testing.assert_array_equal(reachable, anybody)
    np.testing.assert_array_equal(is_open, everybody)
    found = bounds(reachable, is_open)
    assert_sound(found, anybody, everybody)
    computed = (np.asarray(found.stop) - np.asarray(found.first)).sum()
    assert computed == anybody.sum(), "tiles that anybody sees are neighbours in a row"


def ascending(generator, length, stride):
    return np.sort(generator.choice(length * stride, size=length, replace=False))


# Of few shapes: each is so many small compilations.
@settings(max_examples=30)
@given(
    T=st.sampled_from([5, 17]),
    S=st.sampled_from([5, 12]),
    tile=st.sampled_from([1, 4]),
    mask=masks,
    batch=st.sampled_from([1, 3]),
    placed=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_positions_and_segments(T, S, tile, mask, batch, placed, packed, seed):
    """Rows and columns of tiles; any ascending positions, each row of the batch its own; any segment ids at all."""
    generator = np.random.default_rng(seed)
    rows_of_positions = batch if placed else 1
    p = np.stack([ascending(generator, T, 2) for _ in range(rows_of_positions)])
    s = np.stack([ascending(generator, S, 3) for _ in range(rows_of_positions)])
    a, b = generator.integers(-1, 3, (batch, T)), generator.integers(-1, 3, (batch, S))
    segments = (a, b) if packed else None
    queries, keys = rectangle(T, S, positions=(p, s), segments=segments)
    rows, columns = Tiling.of(T, tile), Tiling.of(S, tile)
    reachable, is_open = visible_tiles(queries, keys, relation=Relation(mask), rows=rows, columns=columns)
    shown = visible(mask, p, s, *(segments or ()))
    anybody, everybody = dense_by_tile(shown, rows, columns)
    grid = (len(anybody), rows.count, columns.count)
    reachable, is_open = np.broadcast_to(reachable, grid), np.broadcast_to(is_open, grid)
    assert not (anybody & ~reachable).any()
    assert not (is_open & ~everybody).any()
    for one in range(grid[0]):
        by_row = bounds(reachable[one], is_open[one])
        assert_sound(by_row, anybody[one], everybody[one])
        by_column = bounds(reachable[one].T, is_open[one].T)
        assert_sound(by_column, anybody[one].T, everybody[one].T)


@EXAMPLES
@given(grid=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=5, max_size=5), min_size=1, max_size=4))
def test_bounds_of_any_grid(grid):
    """Reachable tiles with holes between, open ones in several runs: numpy and jax say the same, and it is sound."""
    reachable = np.array([[reached for reached, _ in row] for row in grid])
    is_open = np.array([[reached and opened for reached, opened in row] for row in grid])
    found = bounds(reachable, is_open)
    assert_sound(found, reachable, is_open)
    for a, b in zip(found, bounds(jnp.asarray(reachable), jnp.asarray(is_open)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_causal_row_is_open_tiles_and_then_one_with_a_mask():
    queries, keys = rectangle(12, 12)
    tiling = Tiling.of(12, 4)
    found = bounds(*visible_tiles(queries, keys, relation=DIAGONAL, rows=tiling, columns=tiling))
    assert [x.tolist() for x in found] == [[0, 0, 0], [0, 0, 0], [0, 1, 2], [1, 2, 3]]
    assert found.known_equal("first", "open_first")
    assert not found.known_equal("open_stop", "stop")


def all_known_open(found):
    return found.known_equal("first", "open_first") and found.known_equal("open_stop", "stop")


def test_that_no_tile_needs_a_mask_is_said_only_where_it_is_known():
    queries, keys = rectangle(8, 8)
    whole, uneven = Tiling.of(8, 4), Tiling.of(8, 3)
    everything = Relation(FULL)
    assert all_known_open(bounds(*visible_tiles(queries, keys, relation=everything, rows=whole, columns=whole)))
    assert not all_known_open(bounds(*visible_tiles(queries, keys, relation=everything, rows=whole, columns=uneven)))
    packed = rectangle(8, 8, segments=(np.zeros((1, 8), int), np.zeros((1, 8), int)))
    packed_tiles = visible_tiles(*packed, relation=everything, rows=whole, columns=whole)
    assert not all_known_open(bounds(*(x[0] for x in packed_tiles)))


def test_one_document_in_a_tile_needs_no_mask():
    """Tiles within a document are open, across documents unreachable, and of padding unreachable."""
    ids = np.array([[0, 0, 0, 0, 1, 1, -1, -1]])
    queries, keys = rectangle(8, 8, segments=(ids, ids))
    tiling = Tiling.of(8, 2)
    reachable, is_open = visible_tiles(queries, keys, relation=Relation(FULL), rows=tiling, columns=tiling)
    expected = np.zeros((4, 4), bool)
    expected[:2, :2] = expected[2, 2] = True
    np.testing.assert_array_equal(reachable[0], expected)
    np.testing.assert_array_equal(is_open[0], expected)
