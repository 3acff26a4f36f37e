import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.evaluation.normalise import ReturnScale
from ring_rl.training.statistics import estimate

RETURNS = st.floats(-1e4, 1e4)


@given(random=RETURNS, above=st.floats(1e-3, 1e4), value=RETURNS, other=RETURNS)
def test_chance_is_0_and_the_best_100_and_between_them_it_is_a_line(random, above, value, other):
    scale = ReturnScale(random=random, best=random + above)
    ends = scale.scores(np.array([scale.random, scale.best]))
    np.testing.assert_allclose(ends, [0, 100], atol=1e-6)
    difference = scale.scores(value) - scale.scores(other)
    np.testing.assert_allclose(difference, scale.differences(value - other), rtol=1e-6, atol=1e-6 / above * 1e4)


def test_an_interval_is_carried_over():
    scale, raw = ReturnScale(random=20.0, best=220.0), estimate(np.array([100.0, 120.0, 140.0]))
    assert f"{scale.estimate(raw):.2f}" == f"{estimate(scale.scores(np.array([100.0, 120.0, 140.0]))):.2f}"
    assert scale.estimate(raw).seeds == 3


@pytest.mark.parametrize("best", [20.0, 19.0])
def test_data_no_better_than_chance_are_refused(best):
    with pytest.raises(ValueError, match=r"not above the random policy's 20.*random_policy=false"):
        ReturnScale(random=20.0, best=best)


def test_ends_must_be_numbers():
    with pytest.raises(ValueError, match="finite ends, got random=nan"):
        ReturnScale(random=float("nan"), best=1.0)
