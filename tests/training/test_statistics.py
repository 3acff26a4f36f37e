import numpy as np
import pytest

from ring_rl.training.statistics import Estimate, estimate


def test_interval_by_hand():
    """Five values 1..5: mean 3, standard error sqrt(2.5 / 5), t of 4 degrees of freedom 2.7764."""
    got = estimate(np.arange(1.0, 6.0))
    assert (got.mean, got.seeds) == (3.0, 5)
    assert got.high - 3.0 == pytest.approx(2.7764 * np.sqrt(0.5), rel=1e-4)
    assert 3.0 - got.low == pytest.approx(got.high - 3.0)
    assert str(got) == f"{got}" == "3 [1, 5]"


def test_one_seed_has_no_interval():
    assert np.isnan(estimate(np.array([4.0])).low)
    assert str(estimate(np.array([4.0]))) == "4"
    assert f"{estimate(np.array([0.4321])):.2g}" == "0.43"


def test_the_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [estimate(generator.normal(size=5)) for _ in range(2000)]
    covered = np.mean([each.low <= 0 <= each.high for each in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_mean_and_bounds_are_formatted_alike():
    assert f"{Estimate(0.12345, 0.1, 0.2, 3):.3g}" == "0.123 [0.1, 0.2]"


def test_no_values_have_no_mean():
    with pytest.raises(ValueError, match="no values"):
        estimate(np.array([]))
