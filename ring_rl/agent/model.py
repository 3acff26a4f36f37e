"""Agents that read chains of trajectories.

Every agent is a module with three views of one function:

    __call__(batch, parallel)   the action of every step of whole chains, for training
    act(memory, now)            the next action, given a memory of everything before
    observe(memory, now)        the memory with what that action led to
    observe_and_act(memory, past, now)   both at once, for an outcome and the step that follows it

`act` and `observe` in turn give the actions that `__call__` gives on the chain so far.
"""

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.td3_bc.networks import TD3BC, TD3BCConfig
from ring_rl.agent.tokens import (
    Normalisation,
    TokenEmbedding,
    TokenLayout,
    tokens_before_action,
    tokens_per_step,
)
from ring_rl.nn.kv_cache import KVCache
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer import Transformer, TransformerConfig
from ring_rl.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceModelConfig:
    """An Agentic Transformer; with chains of one trajectory it is a Decision Transformer.

    Attributes:
        name: Tells the kinds of models apart in a checkpoint.
        token_layout: How a step becomes tokens.
        previous_step_in_token: Whether a fused token also holds the previous action and reward.
        return_octaves: Octaves of the return-to-go's Fourier features.
        time_octaves: Octaves of the episode time's Fourier features.
        trajectories: Trajectories a context can hold.
        episode_steps: Decisions L in an episode.
        observation_dim: O.
        action_dim: A.
        normalisation: Scales taken from the data.
        transformer: The size of the trunk.
    """

    name: Literal["sequence"]
    token_layout: TokenLayout
    previous_step_in_token: bool
    return_octaves: int
    time_octaves: int
    trajectories: int
    episode_steps: int
    observation_dim: int
    action_dim: int
    normalisation: Normalisation
    transformer: TransformerConfig


def check_token_layout(token_layout: TokenLayout, parallel: SequenceParallel) -> None:
    """Raises ValueError unless the layout of steps over the ring is also one of their tokens.

    Steps are dealt out to devices before they become tokens. Runs of steps are runs of tokens, so contiguous and
    zigzag stay what they are; a stripe of every n-th step is no stripe of every n-th token.
    """
    count = tokens_per_step(token_layout)
    if parallel.layout == "striped" and parallel.ring_size > 1 and count > 1:
        raise ValueError(
            f"layout=striped deals out single tokens, and token_layout={token_layout} makes {count} of a step; "
            f"use layout=zigzag or contiguous, or token_layout=fused"
        )


class AgenticTransformer(nnx.Module):
    """Predicts each action of a chain from all that came before it."""

    def __init__(self, config: SequenceModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = TokenEmbedding(
            layout=config.token_layout,
            observation_dim=config.observation_dim,
            action_dim=config.action_dim,
            trajectories=config.trajectories,
            episode_steps=config.episode_steps,
            return_octaves=config.return_octaves,
            time_octaves=config.time_octaves,
            previous_step_in_token=config.previous_step_in_token,
            normalisation=config.normalisation,
            width=config.transformer.width,
            rngs=rngs,
        )
        self.transformer = Transformer(config.transformer, rngs=rngs)
        self.action_head = nnx.Linear(config.transformer.width, config.action_dim, rngs=rngs)

    def __call__(self, batch: ChainBatch, parallel: SequenceParallel) -> Float[Array, "B T A"]:
        """Actions in (-1, 1) for every step, each from the tokens before it. `batch` in `parallel`'s layout.

        Raises:
            ValueError: the layout tears steps apart (`check_token_layout`).
        """
        check_token_layout(self.config.token_layout, parallel)
        B, T = batch.steps.shape
        tokens, positions = self.embedding(batch)
        x_BtM = self.transformer(tokens, positions, parallel)
        n, last_before = (
            tokens_per_step(self.config.token_layout),
            tokens_before_action(self.config.token_layout),
        )
        return self._actions(x_BtM.reshape(B, T, n, -1)[:, :, last_before - 1])

    @property
    def context_trajectories(self) -> int:
        """Episodes that one memory holds before it must be emptied."""
        return self.config.trajectories

    def begin(self, *, batch: int) -> KVCache:
        """A memory of nothing, with room for `context_trajectories` episodes."""
        config = self.config
        steps = config.trajectories * config.episode_steps
        return self.transformer.empty_cache(batch=batch, capacity=steps * tokens_per_step(config.token_layout))

    def act(self, memory: KVCache, now: ChainBatch) -> tuple[Float[Array, "B A"], KVCache]:
        """The action of one step, T = 1; of `now` only what is known before acting is read."""
        x_BnM, memory = self.transformer.decode(self.embedding.before_action(now)[:, 0], memory)
        return self._actions(x_BnM[:, -1]), memory

    def observe(self, memory: KVCache, now: ChainBatch) -> KVCache:
        """The memory after the step `now`, its action, reward and completion filled in."""
        if tokens_per_step(self.config.token_layout) == tokens_before_action(self.config.token_layout):
            return memory
        return self.transformer.decode(self.embedding.after_action(now)[:, 0], memory)[1]

    def observe_and_act(
        self, memory: KVCache, past: ChainBatch, now: ChainBatch
    ) -> tuple[Float[Array, "B A"], KVCache]:
        """`act` after `observe`, reading the memory once instead of twice."""
        tokens = jnp.concatenate([self.embedding.after_action(past), self.embedding.before_action(now)], axis=2)
        x_BnM, memory = self.transformer.decode(tokens[:, 0], memory)
        return self._actions(x_BnM[:, -1]), memory

    def _actions(self, x: Float[Array, "*b M"]) -> Float[Array, "*b A"]:
        return jnp.tanh(self.action_head(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BehaviourCloningConfig:
    """A multilayer perceptron from observation to action.

    Attributes:
        name: Tells the kinds of models apart in a checkpoint.
        hidden_widths: One hidden layer each.
        observation_dim: O.
        action_dim: A.
        normalisation: Scales taken from the data.
    """

    name: Literal["behaviour_cloning"]
    hidden_widths: tuple[int, ...]
    observation_dim: int
    action_dim: int
    normalisation: Normalisation


class BehaviourCloning(nnx.Module):
    """Imitates the actions of its data, blind to returns and to the past."""

    def __init__(self, config: BehaviourCloningConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (config.observation_dim, *config.hidden_widths)
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.action_head = nnx.Linear(widths[-1], config.action_dim, rngs=rngs)

    def __call__(self, batch: ChainBatch, parallel: SequenceParallel) -> Float[Array, "B T A"]:
        """Actions in (-1, 1) for every step, each from its own observation."""
        return self._actions(parallel.constrain(batch.observations))

    @property
    def context_trajectories(self) -> int:
        """One: there is no context to carry over."""
        return 1

    def begin(self, *, batch: int) -> tuple[()]:
        """No memory."""
        del batch
        return ()

    def act(self, memory: tuple[()], now: ChainBatch) -> tuple[Float[Array, "B A"], tuple[()]]:
        """The action of one step, T = 1."""
        return self._actions(now.observations[:, 0]), memory

    def observe(self, memory: tuple[()], now: ChainBatch) -> tuple[()]:
        """Remembers nothing."""
        del now
        return memory

    def observe_and_act(
        self, memory: tuple[()], past: ChainBatch, now: ChainBatch
    ) -> tuple[Float[Array, "B A"], tuple[()]]:
        """`act`; there is nothing to remember."""
        del past
        return self.act(memory, now)

    def _actions(self, observations: Float[Array, "*b O"]) -> Float[Array, "*b A"]:
        x = self.config.normalisation.observations(observations)
        for layer in self.hidden:
            x = jax.nn.gelu(layer(x))
        return jnp.tanh(self.action_head(x))


# What imitates, and so is trained by `ring_rl.agent.loss`.
ImitationModel = AgenticTransformer | BehaviourCloning
ModelConfig = SequenceModelConfig | BehaviourCloningConfig | TD3BCConfig
AgentModel = ImitationModel | TD3BC
Memory = Any


def make_model(config: ModelConfig, rngs: nnx.Rngs) -> AgentModel:
    """A freshly initialised model of the kind that `config` describes."""
    if isinstance(config, BehaviourCloningConfig):
        return BehaviourCloning(config, rngs=rngs)
    if isinstance(config, TD3BCConfig):
        return TD3BC(config, rngs=rngs)
    return AgenticTransformer(config, rngs=rngs)
