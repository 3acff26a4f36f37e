"""Random network distillation (arXiv:1810.12894), as URLB rewards novelty with it (arXiv:2110.15191).

A predictor learns to imitate a frozen random network. Where it fails, the observation is new::

    error(o) = mean (predictor(n(o)) - target(n(o)))^2         n: compressed, whitened by the batch's moments, clipped
    reward   = scale * error / running standard deviation of the error

The batch trains the predictor before it is rewarded. The error is not centred: rewards are positive.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ring_rl.agent.exploration.ddpg import linear
from ring_rl.typing import Array, Float, PRNGKeyArray, PyTree

__all__ = ["Novelty", "NoveltyConfig", "NoveltyState", "RunningMoments", "update_moments", "whiten"]

# The prior of the running moments, mean 0 and variance 1, weighs as much as so many samples.
_PRIOR_SAMPLES = 1e-4


@dataclass(frozen=True)
class NoveltyConfig:
    """Numbers of random network distillation.

    Attributes:
        hidden_width: Of the two hidden layers of predictor and target.
        representation_dim: Outputs of both.
        learning_rate: Adam's, for the predictor.
        observation_clip: Whitened observations are clipped to +- this.
        compression: "symlog" takes sign(o) log(1 + |o|) of observations before they are whitened. Without it the
            largest velocities ever seen set the scale, and standing still is not told apart from moving.
        target_bias_deviation: Standard deviation of the target's hidden biases. Without biases the target is
            linear along every ray from the mean, and novelty grows with the distance rather than the rarity.
        target_gain: Factor of the target's inputs. The larger it is, the faster the target changes from one
            observation to the next, and the less a predictor guesses right where it has seldom been.
        scale: Of the reward.
    """

    hidden_width: int
    representation_dim: int
    learning_rate: float
    observation_clip: float
    compression: Literal["none", "symlog"]
    target_bias_deviation: float
    target_gain: float
    scale: float

    def __post_init__(self) -> None:
        for name in ("hidden_width", "representation_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "observation_clip", "target_gain", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.target_bias_deviation < 0:
            raise ValueError(f"target_bias_deviation must not be negative, got {self.target_bias_deviation}")


class RunningMoments(NamedTuple):
    """Mean and variance of all that was seen; `weight` samples, the prior included."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]
    weight: Float[Array, ""]


class NoveltyState(NamedTuple):
    """The frozen target, the predictor and what its training changes."""

    target: PyTree[Array]
    predictor: PyTree[Array]
    optimizer: PyTree[Array]
    error_moments: RunningMoments


@dataclass(frozen=True)
class Novelty:
    """Pure functions of a `NoveltyState`; equal ones are one static argument to `jax.jit`.

    Attributes:
        config: The numbers.
        observation_dim: O.
    """

    config: NoveltyConfig
    observation_dim: int

    def init(self, key: PRNGKeyArray) -> NoveltyState:
        """Two independent random networks."""
        target_key, predictor_key = jax.random.split(key)
        target = nnx.state(self._make_network(nnx.Rngs(target_key), self.config.target_bias_deviation))
        predictor = nnx.state(self._make_network(nnx.Rngs(predictor_key), 0.0))
        moments = RunningMoments(jnp.zeros(()), jnp.ones(()), jnp.asarray(_PRIOR_SAMPLES))
        return NoveltyState(target, predictor, self._optimizer.init(predictor), moments)

    def errors(
        self, predictor: PyTree[Array], target: PyTree[Array], observations_BO: Float[Array | np.ndarray, "B O"]
    ) -> Float[Array, " B"]:
        """How badly the predictor imitates the target; see the module."""
        clip = self.config.observation_clip
        if self.config.compression == "symlog":
            observations_BO = jnp.sign(observations_BO) * jnp.log1p(jnp.abs(observations_BO))
        whitened_BO = jnp.clip(whiten(observations_BO), -clip, clip)
        predicted = nnx.merge(self._graph, predictor)(whitened_BO)
        wanted = nnx.merge(self._graph, target)(self.config.target_gain * whitened_BO)
        return jnp.square(predicted - jax.lax.stop_gradient(wanted)).mean(axis=-1)

    def update(
        self, state: NoveltyState, observations_BO: Float[Array | np.ndarray, "B O"]
    ) -> tuple[NoveltyState, Float[Array, " B"]]:
        """Trains the predictor on a batch, then rewards it."""

        def loss(predictor: PyTree[Array]) -> Float[Array, ""]:
            return self.errors(predictor, state.target, observations_BO).mean()

        updates, optimizer = self._optimizer.update(jax.grad(loss)(state.predictor), state.optimizer)
        predictor = optax.apply_updates(state.predictor, updates)
        errors_B = self.errors(predictor, state.target, observations_BO)
        moments = update_moments(state.error_moments, errors_B)
        rewards_B = self.config.scale * errors_B / (jnp.sqrt(moments.variance) + 1e-8)
        return NoveltyState(state.target, predictor, optimizer, moments), rewards_B

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.config.learning_rate)

    @cached_property
    def _graph(self) -> nnx.GraphDef[_Network]:
        return nnx.graphdef(nnx.eval_shape(lambda: self._make_network(nnx.Rngs(0), 0.0)))

    def _make_network(self, rngs: nnx.Rngs, bias_deviation: float) -> _Network:
        width = self.config.hidden_width
        widths = (self.observation_dim, width, width, self.config.representation_dim)
        return _Network(widths, bias_deviation=bias_deviation, rngs=rngs)


def whiten(observations_BO: Float[Array | np.ndarray, "B O"]) -> Float[Array, "B O"]:
    """Every column with mean 0 and deviation 1 over the batch: batch normalisation without learnt scales."""
    observations_BO = jnp.asarray(observations_BO)
    mean_O = observations_BO.mean(axis=0)
    return (observations_BO - mean_O) * jax.lax.rsqrt(observations_BO.var(axis=0) + 1e-5)


def update_moments(moments: RunningMoments, samples_B: Float[Array, " B"]) -> RunningMoments:
    """Joins a batch's moments to the running ones (Chan, Golub and LeVeque, 1979)."""
    size = samples_B.shape[0]
    weight = moments.weight + size
    difference = samples_B.mean() - moments.mean
    between = jnp.square(difference) * moments.weight * size / weight
    variance = (moments.variance * moments.weight + samples_B.var() * size + between) / weight
    return RunningMoments(moments.mean + difference * size / weight, variance, weight)


class _Network(nnx.Module):
    def __init__(self, widths: tuple[int, ...], *, bias_deviation: float, rngs: nnx.Rngs) -> None:
        *hidden, last = itertools.pairwise(widths)
        layers = [linear(*pair, bias_deviation=bias_deviation, rngs=rngs) for pair in hidden]
        self.layers = nnx.List([*layers, linear(*last, bias_deviation=0.0, rngs=rngs)])

    def __call__(self, inputs: Float[Array, "*rows O"]) -> Float[Array, "*rows representation"]:
        *hidden, last = self.layers
        for layer in hidden:
            inputs = nnx.relu(layer(inputs))
        return last(inputs)
