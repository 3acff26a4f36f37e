import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ring_rl.agent.evaluation.aggregate import (
    aggregate,
    aggregate_agents,
    aggregate_rows,
    compare,
    difference,
    interquartile_mean,
    probability_of_improvement,
)

SCORES = st.lists(st.integers(-100, 100).map(float), min_size=2, max_size=6).map(np.array)
BY_TASK = st.dictionaries(st.sampled_from(["run", "walk", "reach"]), SCORES, min_size=1)
FEW = {"resamples": 50, "seed": 0}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40).map(np.array))
def test_interquartile_mean_is_the_trimmed_mean(scores):
    np.testing.assert_allclose(interquartile_mean(scores), stats.trim_mean(scores, 0.25), rtol=1e-9, atol=1e-6)


def test_interquartile_mean_forgets_outliers():
    assert interquartile_mean(np.array([[1.0, 2, 3, 1000], [-1000, 2, 3, 4]])).tolist() == [2.5, 2.5]


@pytest.mark.parametrize("statistic", ["mean", "interquartile_mean"])
def test_bootstrap_matches_all_resamples_enumerated(statistic):
    """Two tasks of 3 runs have 3^3 · 3^3 resamples, each as likely; deviations are stretched by √(3/2)."""
    scores = {"a": np.array([0.0, 10.0, 35.0]), "b": np.array([50.0, 60.0, 90.0])}
    of = np.mean if statistic == "mean" else lambda runs: stats.trim_mean(runs, 0.25)
    stretched = [each.mean() + np.sqrt(3 / 2) * (each - each.mean()) for each in scores.values()]
    every = [
        of([*a, *b])
        for a in itertools.product(stretched[0], repeat=3)
        for b in itertools.product(stretched[1], repeat=3)
    ]
    got = aggregate(scores, statistic=statistic, resamples=60_000, seed=1)
    assert got.value == pytest.approx(of(np.concatenate(list(scores.values()))))
    expected = np.quantile(every, [0.025, 0.975])
    # The enumerated distribution is discrete: its quantiles move by less than an atom.
    np.testing.assert_allclose([got.low, got.high], expected, atol=0.05 * np.ptp(expected))


@given(BY_TASK, st.floats(-50, 50), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_intervals_move_and_scale_with_the_scores(scores, shift, factor):
    for statistic in ("mean", "interquartile_mean"):
        plain = aggregate(scores, statistic=statistic, **FEW)
        assert plain == aggregate(scores, statistic=statistic, **FEW)
        moved = aggregate({task: factor * each + shift for task, each in scores.items()}, statistic=statistic, **FEW)
        for name in ("value", "low", "high"):
            assert getattr(moved, name) == pytest.approx(factor * getattr(plain, name) + shift, abs=1e-6)
        assert plain.low <= plain.high


def coverage(*, seeds, tasks, resamples=400, trials=600):
    """How often the interval holds the true mean of runs that differ by task and by chance."""
    generator = np.random.default_rng(0)
    truth = generator.normal(50, 20, size=tasks)
    hits = 0
    for trial in range(trials):
        runs = truth[:, None] + generator.normal(0, 10, size=(tasks, seeds))
        scores = {str(task): each for task, each in enumerate(runs)}
        interval = aggregate(scores, statistic="mean", resamples=resamples, seed=trial)
        hits += interval.low <= truth.mean() <= interval.high
    return hits / trials


@pytest.mark.parametrize(("seeds", "tasks"), [(3, 6), (5, 6), (10, 3)])
def test_an_interval_of_95_percent_holds_the_truth_about_that_often(seeds, tasks):
    # Resampling without stretching would reach 0.87 with 3 seeds and 6 tasks.
    assert 0.9 <= coverage(seeds=seeds, tasks=tasks) <= 0.98


@given(BY_TASK, st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_an_agent_does_not_differ_from_itself(scores, seed):
    same = compare(scores, scores, paired=True, resamples=50, seed=seed)
    assert (same.mean.value, same.mean.low, same.mean.high) == (0, 0, 0)
    assert (same.interquartile_mean.low, same.interquartile_mean.high) == (0, 0)
    assert same.probability_of_improvement.value == pytest.approx(0.5)


def test_pairing_takes_out_what_seeds_share():
    generator = np.random.default_rng(0)
    shared = {task: generator.normal(0, 30, size=8) for task in ("a", "b", "c")}
    better = {task: each + 1 + generator.normal(0, 0.5, size=8) for task, each in shared.items()}
    paired, apart = (
        difference(better, shared, statistic="mean", paired=paired, resamples=2000, seed=0) for paired in (True, False)
    )
    assert 0 < paired.low < paired.value == apart.value < paired.high
    assert apart.low < 0 < apart.high


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_probability_of_improvement_counts_pairs(tasks):
    first, second = ({str(n): pair[i] for n, pair in enumerate(tasks)} for i in (0, 1))
    by_hand = np.mean([np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]) for a, b in tasks])
    got = probability_of_improvement(first, second, paired=False, **FEW)
    assert got.value == pytest.approx(by_hand)
    # Scaled by the number of pairs it is Mann and Whitney's U.
    u = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in tasks]
    assert got.value == pytest.approx(np.mean(u))
    assert 0 <= got.low <= got.high <= 1
    other = probability_of_improvement(second, first, paired=False, **FEW)
    assert other.value == pytest.approx(1 - by_hand)


def test_one_that_always_wins_improves_for_certain():
    first, second = {"a": np.array([3.0, 4.0])}, {"a": np.array([1.0, 2.0, 2.5])}
    got = probability_of_improvement(first, second, paired=False, **FEW)
    assert (got.value, got.low, got.high) == (1, 1, 1)


def test_a_single_run_has_no_interval():
    got = aggregate({"a": np.array([1.0, 2.0]), "b": np.array([3.0])}, statistic="mean", **FEW)
    assert got.value == 2
    assert np.isnan([got.low, got.high]).all()
    assert str(got) == f"{got}" == "2.0"


def test_a_table_of_agents_over_tasks():
    scores = {"walk": {"at": np.array([1.0, 3.0]), "bc": np.array([0.0, 0.0])}, "run": {"bc": np.array([4.0, 4.0])}}
    with pytest.raises(ValueError, match="at has no score on run; evaluate it there"):
        aggregate_agents(scores, **FEW)
    scores["run"]["at"] = np.array([5.0, 7.0])
    aggregates = aggregate_agents(scores, **FEW)
    assert (aggregates["at"].mean.value, aggregates["at"].runs) == (4.0, 4)
    rows = aggregate_rows(aggregates)
    assert rows[0] == ["agent", "mean", "interquartile mean", "runs"]
    assert rows[2] == ["bc", "2.0 [2.0, 2.0]", "2.0 [2.0, 2.0]", "4"]


def test_bad_scores():
    one = {"a": np.array([1.0, 2.0])}
    with pytest.raises(ValueError, match="no task to aggregate over"):
        aggregate({}, statistic="mean", **FEW)
    with pytest.raises(ValueError, match=r"a needs a list of finite scores.*1 that are not finite"):
        aggregate({"a": np.array([1.0, np.nan])}, statistic="mean", **FEW)
    with pytest.raises(ValueError, match="on the same tasks only, got a and b"):
        difference(one, {"b": one["a"]}, statistic="mean", paired=False, **FEW)
    with pytest.raises(ValueError, match="a has 2 and 3 runs, which cannot be paired"):
        difference(one, {"a": np.zeros(3)}, statistic="mean", paired=True, **FEW)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        aggregate(one, statistic="mean", resamples=0, seed=0)
