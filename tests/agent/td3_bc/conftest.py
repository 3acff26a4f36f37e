"""Small networks, and the same in numpy at float64."""

from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from ring_rl.agent.td3_bc.losses import LearningConfig
from ring_rl.agent.td3_bc.networks import TD3BC, TD3BCConfig
from ring_rl.agent.td3_bc.transitions import Minibatch
from ring_rl.agent.tokens import Normalisation

OBSERVATION_DIM, ACTION_DIM = 3, 2


def network_config(hidden_widths=(8, 7), observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM):
    return TD3BCConfig(
        name="td3_bc",
        hidden_widths=hidden_widths,
        observation_dim=observation_dim,
        action_dim=action_dim,
        normalisation=Normalisation(
            observation_mean=tuple(0.1 * i for i in range(observation_dim)),
            observation_scale=tuple(1.5 + i for i in range(observation_dim)),
            return_scale=1.0,
        ),
    )


def learning_config(**changes):
    numbers = {
        "discount": 0.9,
        "target_rate": 0.1,
        "actor_delay": 2,
        "smoothing_noise": 0.2,
        "smoothing_clip": 0.3,
        "value_weight": 2.5,
    }
    return LearningConfig(**(numbers | changes))


def minibatch(generator, size=16):
    return Minibatch(
        observations=generator.normal(size=(size, OBSERVATION_DIM)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(size, ACTION_DIM)).astype(np.float32),
        rewards=generator.normal(size=size).astype(np.float32),
        discounts=(generator.uniform(size=size) < 0.7).astype(np.float32),
        next_observations=generator.normal(size=(size, OBSERVATION_DIM)).astype(np.float32),
    )


class Reference:
    """A `TD3BC` in numpy, float64."""

    def __init__(self, model: TD3BC):
        self.normalisation = model.config.normalisation
        read = lambda net: [  # noqa: E731
            (np.asarray(layer.kernel.get_value(), np.float64), np.asarray(layer.bias.get_value(), np.float64))
            for layer in net.layers
        ]
        self.actor, self.critics = read(model.actor), [read(critic) for critic in model.critics]

    def normalised(self, observations):
        mean, scale = (np.array(x) for x in (self.normalisation.observation_mean, self.normalisation.observation_scale))
        return (np.asarray(observations, np.float64) - mean) / scale

    @staticmethod
    def forward(layers, x):
        for index, (kernel, bias) in enumerate(layers):
            x = x @ kernel + bias
            if index + 1 < len(layers):
                x = np.maximum(x, 0)
        return x

    def actions(self, observations):
        return np.tanh(self.forward(self.actor, self.normalised(observations)))

    def value(self, observations, actions, critic):
        inputs = np.concatenate([self.normalised(observations), np.asarray(actions, np.float64)], axis=1)
        return self.forward(self.critics[critic], inputs)[:, 0]


@pytest.fixture(scope="session")
def td3():
    """Makers of small networks, configurations and minibatches."""
    return SimpleNamespace(
        network_config=network_config,
        learning_config=learning_config,
        minibatch=minibatch,
        Reference=Reference,
        model=lambda seed=0, **sizes: TD3BC(network_config(**sizes), rngs=nnx.Rngs(seed)),
    )
