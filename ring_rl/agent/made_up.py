"""Episodes of noise, for measuring what training costs where there is nothing to learn."""

import numpy as np

from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.agent.episodes.trajectory import Trajectory

__all__ = ["made_up_episodes"]


def made_up_episodes(*, episodes: int, steps: int, observation_dim: int, action_dim: int, seed: int = 0) -> EpisodeSet:
    """`episodes` of `steps` decisions each: normal observations, uniform actions and rewards."""
    generator = np.random.default_rng(seed)
    return EpisodeSet(
        tuple(
            Trajectory(
                observations=generator.normal(size=(steps + 1, observation_dim)).astype(np.float32),
                actions=generator.uniform(-1, 1, size=(steps, action_dim)).astype(np.float32),
                rewards=generator.uniform(size=steps).astype(np.float32),
                discounts=np.ones(steps, np.float32),
                physics=None,
            )
            for _ in range(episodes)
        )
    )
