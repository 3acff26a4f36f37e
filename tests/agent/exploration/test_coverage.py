import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.exploration.coverage import (
    CoverageConfig,
    SharedCoordinates,
    coverage,
    occupied_cells,
    particle_entropy,
)

CONFIG = {"resamples": 3, "states": 300, "components": 2, "intervals": 8, "entropy_states": 200, "neighbour": 3}


def episodes(spread, *, count=20, steps=40, width=3, seed=0):
    rng = np.random.default_rng(seed)
    return (spread * rng.uniform(-1, 1, (count, steps, width))).astype(np.float32)


def measure(sets, **changes):
    return coverage(sets, CoverageConfig(**{**CONFIG, **changes}), seed=0)


def test_a_wider_set_covers_more_by_both_figures():
    found = measure({"wide": episodes(2.0), "narrow": episodes(0.5)})
    assert found["wide"].occupied_cells.min() > 2 * found["narrow"].occupied_cells.max()
    assert found["wide"].particle_entropy.min() > found["narrow"].particle_entropy.max()
    assert len(found["wide"].occupied_cells) == 3


def test_heaps_lose_entropy_but_not_cells():
    """Both sets reach equally far; one spends nine tenths of its time in the middle."""
    even = episodes(1.0)
    heaped = even.copy()
    heaped[:, np.arange(40) % 10 != 0] *= 0.05
    found = measure({"even": even, "heaped": heaped}, states=390, intervals=2)
    np.testing.assert_array_equal(found["even"].occupied_cells, found["heaped"].occupied_cells)
    assert found["even"].particle_entropy.min() > found["heaped"].particle_entropy.max()


@given(unit=st.sampled_from([1e-3, 1.0, 1e3]), column=st.integers(0, 2), seed=st.integers(0, 20))
def test_units_do_not_count(unit, column, seed):
    one = {"a": episodes(1.0, seed=seed), "b": episodes(0.3, seed=seed + 1)}
    other = {name: each.copy() for name, each in one.items()}
    for each in other.values():
        each[..., column] *= unit
    left, right = measure(one), measure(other)
    for name in one:
        np.testing.assert_allclose(left[name].particle_entropy, right[name].particle_entropy, rtol=1e-3)


def test_a_set_against_itself_and_a_seed():
    same = measure({"a": episodes(1.0), "b": episodes(1.0)})
    np.testing.assert_array_equal(same["a"].occupied_cells, same["b"].occupied_cells)
    np.testing.assert_array_equal(same["a"].particle_entropy, same["b"].particle_entropy)
    again = measure({"a": episodes(1.0), "b": episodes(1.0)})
    np.testing.assert_array_equal(same["a"].particle_entropy, again["a"].particle_entropy)


def test_cells_are_counted_once_each():
    sets = {"a": np.array([[[0.0, 0.0], [0.0, 4.0], [4.0, 0.0], [4.0, 4.0]]], np.float32)}
    coordinates = SharedCoordinates.of(sets, components=2)
    corners = coordinates.project(sets["a"].reshape(-1, 2))
    assert occupied_cells(corners, coordinates, intervals=2) in (3, 4)  # directions of equal variance may be turned
    assert occupied_cells(np.repeat(corners[:1], 5, axis=0), coordinates, intervals=2) == 1


def test_the_entropy_is_that_of_the_distances():
    line = np.arange(1500.0)[:, None]  # more rows than are taken at once
    assert particle_entropy(line[:3], neighbour=1) == pytest.approx(np.log(2))
    assert particle_entropy(line, neighbour=1) == pytest.approx(np.log(2))
    assert particle_entropy(line, neighbour=2) == pytest.approx((1498 * np.log(2) + 2 * np.log(3)) / 1500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resamples": 1}, "resamples must be at least 2"),
        ({"intervals": 1}, "intervals must be at least 2"),
        ({"states": 0}, "states must be at least 1"),
        ({"neighbour": 0}, "neighbour must be at least 1"),
        ({"entropy_states": 3}, "must be more than neighbour 3"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CoverageConfig(**{**CONFIG, **changes})


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="sets must observe alike"):
        measure({"a": episodes(1.0), "b": episodes(1.0, width=4)})
    with pytest.raises(ValueError, match="components 4 exceed the observation's 3"):
        measure({"a": episodes(1.0)}, components=4)
    with pytest.raises(ValueError, match="half of the set a has 400 states, fewer than the 401"):
        measure({"a": episodes(1.0)}, states=401)
