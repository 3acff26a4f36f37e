import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.exploration.explorers import (
    NoiseConfig,
    NoiseExplorer,
    UniformConfig,
    UniformExplorer,
    split_into_batches,
)

NOISE = {
    "name": "noise",
    "action_hold": 4,
    "batch_size": 8,
    "kind": "mix",
    "reversion": 0.1,
    "deviation": 0.3,
    "shortest_period": 4.0,
    "longest_period": 64.0,
    "largest_amplitude": 0.9,
}


def actions_of(explorer, number, *, decisions=400):
    batch = explorer.batch(number)
    observations = np.zeros((len(batch.reset_seeds), 1), np.float32)
    return np.stack([batch.policy(observations, decision) for decision in range(decisions)])


def noise_explorer(*, episodes=8, seed=0, **changes):
    return NoiseExplorer(NoiseConfig(**{**NOISE, **changes}), episodes=episodes, action_dim=2, seed=seed)


@given(episodes=st.integers(1, 60), batch_size=st.integers(1, 25))
def test_batches_hold_all_episodes(episodes, batch_size):
    sizes = split_into_batches(episodes, batch_size)
    assert sum(sizes) == episodes
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size


@pytest.mark.parametrize("kind", ["uniform", "ornstein_uhlenbeck", "sines", "mix"])
def test_actions_depend_on_the_seed_and_the_batch_alone(kind):
    def build(seed):
        if kind == "uniform":
            return UniformExplorer(UniformConfig("uniform", 4, 5), episodes=12, action_dim=2, seed=seed)
        return noise_explorer(episodes=12, batch_size=5, seed=seed, kind=kind)

    explorer = build(3)
    assert explorer.batch_sizes == (5, 5, 2)
    assert explorer.reward_free
    second = actions_of(explorer, 1, decisions=20)
    assert second.shape == (20, 5, 2)
    assert second.dtype == np.float32
    assert (np.abs(second) <= 1).all()
    np.testing.assert_array_equal(second, actions_of(build(3), 1, decisions=20))
    assert explorer.batch(1).reset_seeds == build(3).batch(1).reset_seeds
    assert explorer.batch(2).recorded == 2
    assert not np.array_equal(second, actions_of(build(4), 1, decisions=20))
    assert not np.array_equal(second, actions_of(explorer, 0, decisions=20))


def test_uniform_actions_fill_the_box():
    explorer = UniformExplorer(UniformConfig("uniform", 4, 8), episodes=8, action_dim=2, seed=0)
    actions = actions_of(explorer, 0)
    assert actions.mean() == pytest.approx(0, abs=0.05)
    assert actions.var() == pytest.approx(1 / 3, rel=0.05)


def test_the_process_keeps_its_deviation_and_its_memory():
    actions = actions_of(noise_explorer(kind="ornstein_uhlenbeck", episodes=8), 0, decisions=4000)
    assert actions.std() == pytest.approx(0.3, rel=0.1)
    later = (actions[:-1] * actions[1:]).mean() / (actions**2).mean()
    assert later == pytest.approx(0.9, abs=0.03)


def test_waves_keep_to_their_periods_and_amplitudes():
    actions = actions_of(noise_explorer(kind="sines"), 0, decisions=1024)
    assert 0.3 < np.abs(actions).max() <= 0.9
    spectrum = np.abs(np.fft.rfft(actions, axis=0))
    strongest = spectrum[1:].argmax(axis=0) + 1
    assert (1024 / strongest >= 3.9).all()
    assert (1024 / strongest <= 70).all()


def test_a_mix_has_both():
    explorer = noise_explorer(episodes=64, batch_size=64)
    spectrum = np.abs(np.fft.rfft(actions_of(explorer, 0, decisions=1024)[:, :, 0], axis=0)) ** 2
    peak_share = spectrum[1:].max(axis=0) / spectrum[1:].sum(axis=0)
    waves = (peak_share > 0.4).mean()
    assert 0.25 < waves < 0.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reversion": 0.0}, "reversion must be above 0"),
        ({"reversion": 1.5}, "reversion must be above 0"),
        ({"deviation": -1.0}, "must not be negative"),
        ({"largest_amplitude": -1.0}, "must not be negative"),
        ({"shortest_period": 1.0}, "2 <= shortest_period"),
        ({"longest_period": 2.0}, "shortest_period <= longest_period"),
        ({"action_hold": 0}, "action_hold must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NoiseConfig(**{**NOISE, **changes})


def test_bad_uniform_settings_are_refused():
    with pytest.raises(ValueError, match="action_hold must be at least 1"):
        UniformConfig("uniform", 0, 8)
