import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ring_rl.agent.evaluation.in_context import (
    holm_adjusted,
    in_context_differences,
    in_context_test,
    paired_test_over_tasks,
    sign_flip_p_value,
)

MONTE_CARLO = {"flips": 4000, "seed": 0}


@given(st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=8).map(np.array))
@settings(deadline=None)
def test_p_values_of_few_units_come_from_all_sign_patterns(differences):
    means = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    expected = np.mean(np.array(means) >= abs(differences.sum()) - 1e-9)
    assert sign_flip_p_value(differences, **MONTE_CARLO) == pytest.approx(expected)
    assert sign_flip_p_value(-differences, **MONTE_CARLO) == pytest.approx(expected)


def test_p_values_agree_with_scipys_paired_permutations():
    differences = np.random.default_rng(0).normal(0.4, 1.0, size=9)
    theirs = stats.permutation_test(
        (differences, np.zeros(9)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p_value(differences, **MONTE_CARLO) == pytest.approx(theirs.pvalue)


def test_random_flips_come_close_to_all_of_them():
    differences = np.random.default_rng(1).normal(0.35, 1.0, size=17)
    signs = 1 - 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1)
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
    got = sign_flip_p_value(differences, flips=20_000, seed=0)
    assert got == sign_flip_p_value(differences, flips=20_000, seed=0)
    assert got == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))
    assert sign_flip_p_value(np.ones(40), flips=999, seed=0) == pytest.approx(0.001)


def test_p_values_are_uniform_where_nothing_differs():
    generator = np.random.default_rng(0)
    p_values = [sign_flip_p_value(generator.normal(size=10), **MONTE_CARLO) for _ in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_the_step_down_rule_rejects(p_values):
    adjusted = holm_adjusted(p_values)
    for alpha in (0.01, 0.05, 0.3):
        rejected, order = set(), np.argsort(p_values, kind="stable")
        for step, index in enumerate(order):
            if p_values[index] * (len(p_values) - step) > alpha:
                break
            rejected.add(int(index))
        assert rejected == {index for index, p in enumerate(adjusted) if p <= alpha}
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))


def test_holm_by_hand():
    assert holm_adjusted([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm_adjusted([]) == []


def conditions(generator, *, worth, seeds=1, rows=12, episodes=4):
    """Returns that depend on the reset a lot, on the index, and from the second episode on on the context."""
    resets = generator.normal(0, 100, size=(rows, episodes)) + 50 * np.arange(episodes)
    noise = generator.normal(0, 2, size=(2, seeds, rows, episodes))
    noise[:, :, :, 0] = noise[0, :, :, 0]
    gain = worth * (np.arange(episodes) > 0)
    return resets + noise[0] + gain, resets + noise[1]


def test_context_that_helps_is_found_and_one_that_does_not_is_not():
    carried, cleared = conditions(np.random.default_rng(0), worth=5.0)
    test = in_context_test(carried, cleared, **MONTE_CARLO)
    assert test.main is test.over_rows
    assert (test.main.unit, test.main.difference.seeds) == ("environment rows", 12)
    assert test.main.p_value < 0.001
    assert test.main.difference.mean == pytest.approx(5.0, abs=1.5)
    assert test.main.difference.low > 0
    assert (test.by_episode[0].mean, len(test.by_episode)) == (0.0, 4)
    # The curve over the index rises all the same: resets differ from index to index.
    carried, cleared = conditions(np.random.default_rng(0), worth=0.0)
    assert carried[0, :, -1].mean() > carried[0, :, 0].mean() + 50
    assert in_context_test(carried, cleared, **MONTE_CARLO).main.p_value > 0.05


def test_training_seeds_are_the_unit_where_there_are_several():
    carried, cleared = conditions(np.random.default_rng(1), worth=5.0, seeds=3)
    test = in_context_test(carried, cleared, **MONTE_CARLO)
    assert (test.main.unit, test.main.difference.seeds) == ("training seeds", 3)
    # Three seeds that agree can say no more than that.
    assert test.main.p_value == test.main.smallest_p_value == 0.25
    assert test.over_rows.p_value < 0.01
    by_hand = (carried - cleared)[:, :, 1:].mean(axis=(1, 2))
    assert test.main.difference.mean == pytest.approx(by_hand.mean())
    assert test.by_episode[2].mean == pytest.approx((carried - cleared)[:, :, 2].mean())


def test_the_first_episode_does_not_count():
    carried, cleared = conditions(np.random.default_rng(2), worth=1.0)
    carried[:, :, 0] += 1e6
    np.testing.assert_allclose(
        in_context_differences(carried, cleared), (carried - cleared)[:, :, 1:].mean(axis=2), rtol=1e-9
    )


def test_episodes_with_which_a_full_context_begins_anew_do_not_count():
    carried, cleared = conditions(np.random.default_rng(2), worth=3.0)
    carried[:, :, 2] = cleared[:, :, 2]
    test = in_context_test(carried, cleared, context_episodes=2, **MONTE_CARLO)
    assert test.main.difference.mean == pytest.approx((carried - cleared)[:, :, [1, 3]].mean())
    assert len(test.by_episode) == 4
    whole = in_context_test(carried, cleared, **MONTE_CARLO)
    assert in_context_test(carried, cleared, context_episodes=4, **MONTE_CARLO) == whole
    with pytest.raises(ValueError, match="contexts of 1 episode hold nothing to learn from"):
        in_context_differences(carried, cleared, context_episodes=1)


def test_tasks_together_can_say_what_three_seeds_cannot():
    generator = np.random.default_rng(3)
    tasks = {task: conditions(generator, worth=4.0, seeds=3) for task in ("stand", "walk", "run", "reach")}
    differences = {task: in_context_differences(*each) for task, each in tasks.items()}
    test = paired_test_over_tasks(differences, **MONTE_CARLO)
    assert (test.difference.seeds, test.unit) == (12, "runs of all tasks")
    assert test.p_value == test.smallest_p_value == 2**-11
    with pytest.raises(ValueError, match="needs at least 2 of them, got 1"):
        paired_test_over_tasks({"a": np.zeros((1, 4))}, **MONTE_CARLO)


def test_unpaired_returns_are_refused():
    with pytest.raises(ValueError, match=r"got shapes \(1, 3, 2\) and \(2, 3, 2\); evaluate the same training seeds"):
        in_context_test(np.zeros((1, 3, 2)), np.zeros((2, 3, 2)), **MONTE_CARLO)
    with pytest.raises(ValueError, match="at least 2 episodes in a row"):
        in_context_test(np.zeros((1, 3, 1)), np.zeros((1, 3, 1)), **MONTE_CARLO)
    with pytest.raises(ValueError, match=r"needs at least 2 of them; raise protocol\.rows"):
        in_context_test(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)), **MONTE_CARLO)
    with pytest.raises(ValueError, match="flips must be at least 1, got 0"):
        in_context_test(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), flips=0, seed=0)
