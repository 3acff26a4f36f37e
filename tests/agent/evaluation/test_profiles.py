import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.agent.evaluation.profiles import performance_profile, plot_performance_profiles, shared_thresholds

RUNS = st.lists(st.floats(0, 100), min_size=2, max_size=5).map(np.array)


@given(st.dictionaries(st.sampled_from("abc"), RUNS, min_size=1))
@settings(max_examples=30, deadline=None)
def test_a_profile_is_the_part_of_runs_above_each_threshold(scores):
    thresholds = shared_thresholds({"agent": scores}, count=21)
    profile = performance_profile(scores, thresholds, resamples=60, seed=0)
    together = np.concatenate(list(scores.values()))
    np.testing.assert_allclose(profile.fractions, [np.mean(together > threshold) for threshold in thresholds])
    assert (profile.fractions[0], profile.fractions[-1]) == (1, 0)
    assert (np.diff(profile.fractions) <= 0).all()
    assert ((profile.low <= profile.high) & (profile.low >= 0) & (profile.high <= 1)).all()
    # The area under it, from the lowest threshold on, is what the mean lies above that.
    fine = np.linspace(thresholds[0], thresholds[-1], 4001)
    area = np.trapezoid(performance_profile(scores, fine, resamples=1, seed=0).fractions, fine)
    np.testing.assert_allclose(thresholds[0] + area, together.mean(), atol=0.1)


def test_bands_hold_a_known_distribution():
    """Of runs drawn from a uniform distribution the profile is a line, which 95% bands hold nearly everywhere."""
    generator, thresholds = np.random.default_rng(0), np.linspace(0.1, 0.9, 9)
    inside = []
    for trial in range(150):
        scores = {task: generator.uniform(size=10) for task in "abcd"}
        profile = performance_profile(scores, thresholds, resamples=200, seed=trial)
        inside.append((profile.low <= 1 - thresholds + 1e-9) & (1 - thresholds <= profile.high + 1e-9))
    assert 0.88 <= np.mean(inside) <= 0.99


def test_a_picture_is_drawn(tmp_path):
    scores = {"agent": {"a": np.array([1.0, 2.0])}, "other": {"a": np.array([0.5, 3.0])}}
    thresholds = shared_thresholds(scores, count=11)
    profiles = {name: performance_profile(each, thresholds, resamples=20, seed=0) for name, each in scores.items()}
    path = tmp_path / "profile.png"
    plot_performance_profiles(profiles, path, title="a", score_label="score", run_label="runs")
    assert path.stat().st_size > 1000
