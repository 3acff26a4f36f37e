"""The search against brute force, on made-up memory curves."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.planning.search import Limit, Probe, known_limit, longest_that_fits, next_length, token_grid

MEMORY = 16_000_000_000


def brute_force(lengths, curve):
    fitting = [length for length in lengths if curve(length) <= MEMORY]
    failing = [length for length in lengths if curve(length) > MEMORY]
    return Limit(longest=max(fitting, default=None), shortest_failing=min(failing, default=None))


def searched(lengths, curve, *, start, fixed=0, degree=1, tells=lambda fits: True):
    """The limit and the lengths that were probed, each once."""
    probed = []

    def probe(length):
        probed.append(length)
        needed = curve(length)
        fits = needed <= MEMORY
        return Probe(fits=fits, needed_bytes=int(needed) if tells(fits) else None)

    limit = longest_that_fits(lengths, probe, start=start, memory_bytes=MEMORY, fixed_bytes=fixed, degree=degree)
    assert len(set(probed)) == len(probed)
    return limit, probed


@given(
    fixed=st.integers(0, 2 * MEMORY),
    per_token=st.integers(0, 10_000_000),
    ripple=st.integers(0, 50_000_000),
    start=st.integers(1, 1_000_000),
    refusals_tell=st.booleans(),
)
def test_nearly_affine_memory_is_searched_in_a_handful_of_probes(fixed, per_token, ripple, start, refusals_tell):
    lengths = token_grid(quantum=512, largest=2**20, significant_bits=4)

    def curve(length):
        return fixed + per_token * length + ripple * (length // 512 % 2)

    limit, probed = searched(lengths, curve, start=start, fixed=fixed // 2, tells=lambda fits: fits or refusals_tell)
    below, above = limit.longest, limit.shortest_failing
    if ripple == 0:
        assert limit == brute_force(lengths, curve)
        assert len(probed) <= 7
    # With a ripple there may be several ends: one of them is found, and both of its sides are seen.
    assert below is None or (curve(below) <= MEMORY and below in probed)
    assert above is None or (curve(above) > MEMORY and above in probed)
    assert len(probed) <= 14


@given(
    steps=st.lists(st.integers(0, MEMORY), min_size=1, max_size=200),
    start=st.integers(0, 300),
    tells=st.booleans(),
)
def test_any_curve_that_grows_is_searched_right(steps, start, tells):
    sizes = sorted(steps)
    lengths = list(range(1, len(sizes) + 1))

    def curve(length):
        return 2 * sizes[length - 1]

    limit, probed = searched(lengths, curve, start=start, tells=lambda fits: tells)
    assert limit == brute_force(lengths, curve)
    # Some foretold, then halving.
    assert len(probed) <= 6 + 1 + len(sizes).bit_length() * 2


@given(per_pair=st.integers(1, 10_000), fixed=st.integers(0, MEMORY))
def test_dense_attention_grows_by_the_square(per_pair, fixed):
    lengths = token_grid(quantum=128, largest=2**17, significant_bits=4)

    def curve(length):
        return fixed + per_pair * length**2

    limit, probed = searched(lengths, curve, start=2048, fixed=fixed, degree=2)
    assert limit == brute_force(lengths, curve)
    assert len(probed) <= 4


def test_affine_memory_takes_four_probes_from_a_start_that_knows_nothing():
    lengths = token_grid(quantum=512, largest=2**20, significant_bits=4)
    _, probed = searched(lengths, lambda length: 2e9 + 300_000 * length, start=4096, fixed=1_000_000_000)
    assert len(probed) == 4


def test_a_search_goes_on_from_what_is_known():
    lengths = list(range(1, 101))
    settings = {"start": 10, "memory_bytes": 55, "fixed_bytes": 0, "degree": 1}
    known = {10: Probe(fits=True, needed_bytes=10), 55: Probe(fits=True, needed_bytes=55)}
    assert next_length(lengths, known, **settings) == 56
    assert known_limit(lengths, known) == Limit(longest=55, shortest_failing=None)
    known[56] = Probe(fits=False, needed_bytes=None)
    assert next_length(lengths, known, **settings) is None
    assert known_limit(lengths, known) == Limit(longest=55, shortest_failing=56)


def test_lengths_known_from_another_grid_teach_nothing_wrong():
    known = {7: Probe(fits=False, needed_bytes=1)}
    assert next_length([4, 8], known, start=8, memory_bytes=10, fixed_bytes=0, degree=1) == 8


def test_nothing_fits_and_everything_fits():
    assert searched([1, 2, 3], lambda length: 2 * MEMORY, start=3)[0] == Limit(longest=None, shortest_failing=1)
    assert searched([1, 2, 3], lambda length: 1, start=1)[0] == Limit(longest=3, shortest_failing=None)


@pytest.mark.parametrize("lengths", [[], [2, 1], [1, 1]])
def test_lengths_must_ascend(lengths):
    with pytest.raises(ValueError, match="must ascend"):
        next_length(lengths, {}, start=1, memory_bytes=1, fixed_bytes=0, degree=1)


@given(quantum=st.integers(1, 4096), bits=st.integers(1, 8), times=st.integers(1, 100_000))
def test_a_grid_is_fine_enough_and_divides_well(quantum, bits, times):
    lengths = token_grid(quantum=quantum, largest=quantum * times, significant_bits=bits)
    assert lengths[0] == quantum
    assert lengths[-1] <= quantum * times
    for short, long in itertools.pairwise(lengths):
        assert short < long <= short * (1 + 2 / 2**bits) + quantum
        multiple = long // quantum
        odd = multiple // (multiple & -multiple)
        assert odd < 2**bits


@pytest.mark.parametrize(("quantum", "largest", "bits"), [(0, 1, 1), (4, 3, 1), (1, 1, 0)])
def test_a_grid_of_nothing_is_refused(quantum, largest, bits):
    with pytest.raises(ValueError, match="at least"):
        token_grid(quantum=quantum, largest=largest, significant_bits=bits)
