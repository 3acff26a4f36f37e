import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.chain_batch import BatchLayout, ChainBatch, ChainSampler, chain_arrays, empty_batch
from ring_rl.agent.hindsight import ChainConfig


def sampler(episodes, *, ring_size=1, layout="zigzag", pad_to_ring=True, trajectories=3, loss_on="all", seed=0):
    chain = ChainConfig(
        trajectories=trajectories,
        random_length=False,
        order="ascending",
        target="chain_maximum",
        sampling="uniform",
        rank_temperature=0.0,
        loss_on=loss_on,
    )
    batch = BatchLayout(batch_size=2, ring_size=ring_size, layout=layout, pad_to_ring=pad_to_ring)
    return ChainSampler(episodes, chain, batch, seed=seed)


def test_a_chain_by_hand(chains):
    generator = np.random.default_rng(0)
    worse, better = chains.trajectory(generator, 3, 0.1), chains.trajectory(generator, 2, 1.0)
    chain = chain_arrays([worse, better], steps=7, loss_on="all", target="chain_maximum")
    target = better.episode_return
    first = target - np.array([0, worse.rewards[0], worse.rewards[:2].sum()])
    second = target - np.array([0, better.rewards[0]])
    np.testing.assert_allclose(chain.returns_to_go, [*first, *second, 0, 0], rtol=1e-6)
    assert chain.completions.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert chain.steps.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert chain.trajectory_indices.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert chain.positions.tolist() == list(range(7))
    assert chain.loss_weights.tolist() == [1, 1, 1, 1, 1, 0, 0]
    # The previous trajectory's last action and reward are not carried into the next one.
    np.testing.assert_array_equal(chain.previous_rewards[:5], [0, *worse.rewards[:2], 0, better.rewards[0]])
    np.testing.assert_array_equal(chain.previous_actions[3], 0)
    np.testing.assert_array_equal(chain.observations[3], better.observations[0])
    np.testing.assert_array_equal(chain.actions[:3], worse.actions)


def test_loss_on_the_last_only(chains):
    generator = np.random.default_rng(0)
    parts = [chains.trajectory(generator, 2, level) for level in (0.1, 1.0)]
    assert chain_arrays(parts, steps=4, loss_on="last", target="chain_maximum").loss_weights.tolist() == [0, 0, 1, 1]


def test_a_single_trajectory_has_its_own_return_as_target(chains):
    trajectory = chains.trajectory(np.random.default_rng(0), 4)
    chain = chain_arrays([trajectory], steps=4, loss_on="all", target="chain_maximum")
    assert chain.returns_to_go[0] == pytest.approx(trajectory.episode_return)
    assert chain.returns_to_go[3] == pytest.approx(trajectory.rewards[3], abs=1e-5)
    assert chain.completions.tolist() == [0, 0, 0, 1]


def test_without_hindsight_every_trajectory_is_told_its_own_return(chains):
    generator = np.random.default_rng(0)
    parts = [chains.trajectory(generator, 2, level) for level in (0.1, 1.0)]
    chain = chain_arrays(parts, steps=4, loss_on="all", target="own_return")
    np.testing.assert_allclose(chain.returns_to_go[[0, 2]], [each.episode_return for each in parts], rtol=1e-6)
    assert chain.completions.tolist() == [0, 1, 0, 1]


def test_a_missed_target_is_not_completed(chains):
    trajectory = chains.trajectory(np.random.default_rng(0), 4)
    missed = chain_arrays([trajectory], steps=4, loss_on="all", target=trajectory.episode_return + 1)
    assert missed.completions.sum() == 0


@pytest.mark.parametrize("index", [0, 5, 2**40])
def test_a_row_depends_on_seed_and_index_alone(chains, index):
    episodes = chains.episode_set(8)
    first, again = sampler(episodes), sampler(episodes)
    first.row(3)  # asking for other rows changes nothing
    for a, b in zip(first.row(index), again.row(index), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_differ_by_index_and_by_seed(chains):
    episodes = chains.episode_set(8)
    rows = [sampler(episodes, seed=seed).row(index).actions for seed in (0, 1) for index in range(8)]
    assert len({row.tobytes() for row in rows}) > 12  # of 16; few chains are equal by chance


def test_the_ring_gets_the_same_row_padded(chains):
    episodes = chains.episode_set(8)  # 3 x 10 steps: a zigzag ring of 4 needs 32
    whole, padded = sampler(episodes), sampler(episodes, ring_size=4)
    assert padded.steps == 32
    for name, a, b in zip(ChainBatch._fields, whole.row(3), padded.row(3), strict=True):
        assert len(b) == 32
        np.testing.assert_array_equal(b[:30], a, err_msg=name)
    np.testing.assert_array_equal(padded.row(3).positions, np.arange(32))
    assert padded.row(3).loss_weights.sum() == 30


def test_without_padding_an_indivisible_chain_is_refused(chains):
    with pytest.raises(ValueError, match=r"sequence length 30 .* pad to 32, or set batch.pad_to_ring=true"):
        sampler(chains.episode_set(8), ring_size=4, pad_to_ring=False)


def test_too_few_episodes_are_refused_before_training(chains):
    with pytest.raises(ValueError, match="the data set has 2"):
        sampler(chains.episode_set(2))


def test_empty_batch_has_the_shapes_of_a_real_one(chains):
    row = sampler(chains.episode_set(8)).row(0)
    real = ChainBatch(*(np.stack([x, x]) for x in row))
    empty = empty_batch(batch_size=2, steps=30, observation_dim=3, action_dim=2)
    for a, b in zip(real, empty, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    padding=st.integers(0, 3),
    loss_on=st.sampled_from(["all", "last"]),
    target=st.sampled_from(["chain_maximum", "own_return", 2.5]),
)
def test_every_step_says_what_the_picture_says(chains, lengths, padding, loss_on, target):
    """Step by step, as the docstring of `ChainBatch` draws it."""
    generator = np.random.default_rng(len(lengths))
    trajectories = [chains.trajectory(generator, length) for length in lengths]
    chain = chain_arrays(trajectories, steps=sum(lengths) + padding, loss_on=loss_on, target=target)
    best = max(each.episode_return for each in trajectories)
    at = 0
    for index, each in enumerate(trajectories):
        asked_for = {"chain_maximum": best, "own_return": each.episode_return}.get(target, target)
        for t in range(each.length):
            collected = sum(float(reward) for reward in each.rewards[:t])
            last = t == each.length - 1
            np.testing.assert_array_equal(chain.observations[at], each.observations[t])
            np.testing.assert_array_equal(chain.actions[at], each.actions[t])
            np.testing.assert_array_equal(chain.previous_actions[at], each.actions[t - 1] if t else 0)
            assert chain.rewards[at] == each.rewards[t]
            assert chain.previous_rewards[at] == (each.rewards[t - 1] if t else 0)
            assert chain.returns_to_go[at] == np.float32(asked_for - collected)
            assert chain.completions[at] == (last and each.episode_return >= asked_for)
            assert (chain.steps[at], chain.trajectory_indices[at], chain.positions[at]) == (t, index, at)
            assert chain.loss_weights[at] == (loss_on == "all" or index == len(lengths) - 1)
            at += 1
    assert all(not column[at:].any() for name, column in chain._asdict().items() if name != "positions")


def test_a_chain_that_is_too_long_is_refused(chains):
    trajectory = chains.trajectory(np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match="a chain of 8 steps does not fit into 7"):
        chain_arrays([trajectory, trajectory], steps=7, loss_on="all", target="own_return")
