"""Windows over shards: exact, and nobody is asked but the neighbours that hold what is seen."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ring_rl.kernels import Mask
from ring_rl.kernels.local.xla import XlaBlock

BLOCK = XlaBlock(block_size=5)


def permutes(jaxpr, equations) -> list[tuple[tuple[int, int], ...]]:
    """The (giver, taker) pairs of every transfer that a program makes, as often as it makes it."""
    return [
        tuple(map(tuple, equation.params["perm"]))
        for equation, times in equations(jaxpr)
        for _ in range(times)
        if equation.primitive.name == "ppermute"
    ]


# Every example is a compilation of its own: few of them, and none spent on finding a smaller one.
@settings(max_examples=4, phases=[Phase.generate])
@given(
    mask=st.one_of(
        st.builds(Mask, causal=st.just(True), window=st.integers(1, 30), causal_block_size=st.sampled_from([1, 2, 6])),
        st.builds(Mask, causal=st.just(False), window=st.integers(1, 20)),
    ),
    layout=st.sampled_from(["zigzag", "contiguous"]),
    ring_size=st.sampled_from([8, 4, 2]),
    chunk=st.integers(1, 7),
    packed=st.booleans(),
    heads=st.sampled_from([(2, 2), (4, 1)]),
    options=st.sampled_from([{}, {"alibi": True, "dropout_rate": 0.2, "soft_cap": 5.0}]),
    seed=st.integers(0, 99),
)
def test_equals_dense_float64(case, chunk, ring_size, options, **rest):
    """Windows of one token, of part of a chunk, of several chunks, and of more than the sequence."""
    case(tokens=2 * ring_size * max(chunk, 2), axes=(ring_size,), head_dim=64, **rest, **options).check()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_virtual_ring(case, layout):
    """Differentiated from outside its vmap, where the axis has no name any more."""
    mask = Mask(causal=True, window=7)
    case(axes=(3,), layout=layout, mask=mask, virtual=True, packed=True, batch=1, tokens=36, local=BLOCK).check()


def test_parts_as_long_as_tiles(case):
    """Shards that are longer than tiles: what a neighbour sends is filled up to whole ones, before the window."""
    options = {"packed": True, "alibi": True, "dropout_rate": 0.2, "local": XlaBlock(block_size=64)}
    case(axes=(2,), mask=Mask(causal=True, window=100), tokens=512, heads=(2, 1), batch=1, **options).check()


def test_both_ways_and_over_several_shards(case):
    mask = Mask(causal=False, window=13)
    case(axes=(8,), mask=mask, tokens=80, alibi=True, dropout_rate=0.2, local=BLOCK).check()


@pytest.mark.parametrize(
    ("mask", "hops"),
    [
        (Mask(causal=True, window=1), 0),
        (Mask(causal=True, window=9), 1),
        (Mask(causal=True, window=10), 2),
        (Mask(causal=True, window=17), 2),
        (Mask(causal=True, window=18), 3),
        (Mask(causal=False, window=9), 2),
        (Mask(causal=True, window=5, causal_block_size=2), 2),
    ],
)
def test_only_neighbours_are_asked(case, equations, mask, hops):
    """8 shards of 8 tokens: forward one transfer for each shard that a window of 9 (itself and 8 back) reaches into."""
    window = case(axes=(8,), mask=mask, tokens=64, local=BLOCK)
    forward = permutes(window.jaxpr(backward=False), equations)
    both = permutes(window.jaxpr(backward=True), equations)
    assert len(forward) == hops
    # Backward fetches the keys again and returns their gradients.
    assert len(both) == 3 * hops
    distances = [{(taker - giver) % 8 for giver, taker in pairs} for pairs in both]
    assert all(len(distance) == 1 for distance in distances), "a transfer goes one way for all devices"
    nearest = -(-hops // (1 if mask.causal and mask.causal_block_size == 1 else 2))
    assert {min(d, 8 - d) for distance in distances for d in distance} == set(range(1, nearest + 1))


def test_zigzag_asks_the_devices_beside(case, equations):
    """Chunks of 4 tokens: early chunks ask the device before, late ones the device after, the middle one itself."""
    window = case(axes=(8,), layout="zigzag", mask=Mask(causal=True, window=5), tokens=64, local=BLOCK)
    for pairs in permutes(window.jaxpr(backward=True), equations):
        assert {(taker - giver) % 8 for giver, taker in pairs if giver != taker} <= {1, 7}
    assert 0 < len(permutes(window.jaxpr(backward=False), equations)) < 7


def test_segment_ids_travel_with_the_keys(case, equations):
    plain, packed = (
        permutes(case(axes=(4,), mask=Mask(causal=True, window=5), packed=x).jaxpr(backward=False), equations)
        for x in (False, True)
    )
    assert len({*plain, *packed}) == 1
    assert 2 * len(plain) == len(packed)


@pytest.mark.parametrize(
    ("layout", "window"),
    [
        ("striped", 5),  # every shard holds a part of every window
        ("contiguous", 48),  # all around: a ring sends no more
        ("zigzag", 48),
    ],
)
def test_goes_round_where_neighbours_are_no_shorter_way(case, equations, layout, window):
    ring = case(axes=(4,), layout=layout, mask=Mask(causal=True, window=window), local=XlaBlock(block_size=12))
    assert permutes(ring.jaxpr(backward=False), equations) == [((0, 1), (1, 2), (2, 3), (3, 0))] * 3
