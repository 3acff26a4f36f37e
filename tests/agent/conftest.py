"""Small made-up episodes and models for the tests of agents."""

from types import SimpleNamespace

import numpy as np
import pytest

from ring_rl.agent.action_heads import DiscretisedConfig, GaussianConfig, MixtureConfig, SquaredErrorConfig
from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.model import SequenceModelConfig
from ring_rl.agent.tokens import Normalisation
from small_models import small_transformer

OBSERVATION_DIM, ACTION_DIM = 3, 2
ACTION_HEADS = {
    "squared_error": SquaredErrorConfig(name="squared_error"),
    "gaussian": GaussianConfig(name="gaussian", smallest_deviation=0.05, largest_deviation=1.0),
    "mixture": MixtureConfig(name="mixture", components=3, smallest_deviation=0.05, largest_deviation=1.0),
    "discretised": DiscretisedConfig(name="discretised", bins=5),
}


def trajectory(generator, length, level=0.5):
    return Trajectory(
        observations=generator.normal(size=(length + 1, OBSERVATION_DIM)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(length, ACTION_DIM)).astype(np.float32),
        rewards=(level * generator.uniform(0, 1, size=length)).astype(np.float32),
        discounts=np.ones(length, np.float32),
        physics=None,
    )


def episode_set(count, *, length=10, seed=0):
    generator = np.random.default_rng(seed)
    return EpisodeSet(tuple(trajectory(generator, length, generator.uniform(0.1, 1)) for _ in range(count)))


def sequence_config(
    token_layout="fused",
    *,
    trajectories=3,
    episode_steps=10,
    previous_step_in_token=True,
    action_head="squared_error",
    time_embedding="fourier",
    trajectory_embedding=True,
    embedding_dropout=0.0,
):
    return SequenceModelConfig(
        name="sequence",
        token_layout=token_layout,
        previous_step_in_token=previous_step_in_token,
        return_octaves=2,
        time_embedding=time_embedding,
        time_octaves=2,
        trajectory_embedding=trajectory_embedding,
        embedding_dropout=embedding_dropout,
        action_head=ACTION_HEADS[action_head],
        trajectories=trajectories,
        episode_steps=episode_steps,
        observation_dim=OBSERVATION_DIM,
        action_dim=ACTION_DIM,
        normalisation=Normalisation(
            observation_mean=(0.1,) * OBSERVATION_DIM,
            observation_scale=(2.0,) * OBSERVATION_DIM,
            return_scale=5.0,
        ),
        transformer=small_transformer(
            query_heads=4, head_dim=4, feed_forward="gelu", feed_forward_width=32, saved_activations="products"
        ),
    )


@pytest.fixture(scope="session")
def chains():
    """Makers of small made-up episodes and models."""
    return SimpleNamespace(
        trajectory=trajectory,
        episode_set=episode_set,
        sequence_config=sequence_config,
        action_heads=ACTION_HEADS,
    )
