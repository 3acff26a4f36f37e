import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ring_rl.lm.evaluation.intervals import wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (45, 50, 0.79, 0.96),
        (2, 2, 0.34, 1),
        (3, 3, 0.44, 1),
        (190, 200, 0.91, 0.97),
        (100, 100, 0.96, 1),
        (0, 2, 0, 0.66),
    ],
)
def test_known_intervals(successes, count, low, high):
    share = wilson(successes, count)
    assert (share.low, share.high) == pytest.approx((low, high), abs=0.006)
    assert share.value == successes / count


@given(count=st.integers(1, 2000), data=st.data())
def test_agrees_with_scipy_and_holds_the_share(count, data):
    successes = data.draw(st.integers(0, count))
    share = wilson(successes, count)
    wanted = stats.binomtest(successes, count).proportion_ci(confidence_level=0.95, method="wilson")
    assert (share.low, share.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert 0 <= share.low <= share.value <= share.high <= 1


def test_what_is_no_share_is_refused():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="between 0 and the 3 trials"):
        wilson(3.5, 3)


def test_all_three_numbers_are_formatted_alike():
    assert f"{wilson(45, 50):.2f}" == str(wilson(45, 50)) == "0.90 [0.79, 0.96]"
