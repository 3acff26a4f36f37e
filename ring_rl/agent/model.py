"""Agents that read chains of trajectories.

Every agent is a module with three views of one function:

    __call__(batch, parallel)                  what it says about every action of whole chains, for training
    act(memory, now, keys)                     the next action, given a memory of everything before
    observe(memory, now)                       the memory with what that action led to
    observe_and_act(memory, past, now, keys)   both at once, for an outcome and the step that follows it

Without keys, `act` and `observe` in turn give the modes of what `__call__` says on the chain so far; with a PRNG key
for each row they draw from it, each row from its own key alone.
"""

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.agent.action_heads import ActionDistribution, ActionHead, ActionHeadConfig
from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.memoryless import MemorylessAgent
from ring_rl.agent.td3_bc.networks import TD3BC, TD3BCConfig
from ring_rl.agent.tokens import (
    Normalisation,
    TimeEmbedding,
    TokenEmbedding,
    TokenLayout,
    dropout,
    tokens_before_action,
    tokens_per_step,
)
from ring_rl.nn.kv_cache import KVCache
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer import Transformer, TransformerConfig
from ring_rl.typing import Array, Float, PRNGKeyArray, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceModelConfig:
    """An Agentic Transformer; with chains of one trajectory it is a Decision Transformer.

    Attributes:
        name: Tells the kinds of models apart in a checkpoint.
        token_layout: How a step becomes tokens.
        previous_step_in_token: Whether a fused token also holds the previous action and reward.
        return_octaves: Octaves of the return-to-go's Fourier features.
        time_embedding: How the time within the episode enters: as Fourier features, as a vector learned for each
            step, or not at all.
        time_octaves: Octaves of the episode time's Fourier features.
        trajectory_embedding: Whether tokens say which trajectory of their chain they belong to.
        embedding_dropout: Share of the embedded tokens' entries that training sets to zero.
        action_head: How actions are read off the trunk.
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
    time_embedding: TimeEmbedding
    time_octaves: int
    trajectory_embedding: bool
    embedding_dropout: float
    action_head: ActionHeadConfig
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
            time_embedding=config.time_embedding,
            time_octaves=config.time_octaves,
            trajectory_embedding=config.trajectory_embedding,
            previous_step_in_token=config.previous_step_in_token,
            normalisation=config.normalisation,
            width=config.transformer.width,
            rngs=rngs,
        )
        self.transformer = Transformer(config.transformer, rngs=rngs)
        self.action_head = ActionHead(
            config.action_head, width=config.transformer.width, action_dim=config.action_dim, rngs=rngs
        )

    def __call__(
        self, batch: ChainBatch, parallel: SequenceParallel, *, dropout_key: PRNGKeyArray | None = None
    ) -> ActionDistribution:
        """Distributions [B T] over the action of every step, each from the tokens before it.

        Args:
            batch: Chains, in `parallel`'s layout.
            parallel: The mesh.
            dropout_key: Of `embedding_dropout`; None drops nothing.

        Raises:
            ValueError: the layout tears steps apart (`check_token_layout`).
        """
        check_token_layout(self.config.token_layout, parallel)
        B, T = batch.steps.shape
        tokens, positions = self.embedding(batch)
        if dropout_key is not None and self.config.embedding_dropout > 0:
            tokens = dropout(tokens, positions, rate=self.config.embedding_dropout, key=dropout_key)
        x_BtM = self.transformer(tokens, positions, parallel)
        n, last_before = (
            tokens_per_step(self.config.token_layout),
            tokens_before_action(self.config.token_layout),
        )
        return self.action_head(x_BtM.reshape(B, T, n, -1)[:, :, last_before - 1])

    @property
    def context_trajectories(self) -> int:
        """Episodes that one memory holds before it must be emptied."""
        return self.config.trajectories

    def begin(self, *, batch: int) -> KVCache:
        """A memory of nothing, with room for `context_trajectories` episodes."""
        config = self.config
        steps = config.trajectories * config.episode_steps
        return self.transformer.empty_cache(batch=batch, capacity=steps * tokens_per_step(config.token_layout))

    def act(
        self, memory: KVCache, now: ChainBatch, keys: Shaped[PRNGKeyArray, " B"] | None = None
    ) -> tuple[Float[Array, "B A"], KVCache]:
        """The action of one step, T = 1; of `now` only what is known before acting is read."""
        x_BnM, memory = self.transformer.decode(self.embedding.before_action(now)[:, 0], memory)
        return chosen(self.action_head(x_BnM[:, -1]), keys), memory

    def observe(self, memory: KVCache, now: ChainBatch) -> KVCache:
        """The memory after the step `now`, its action, reward and completion filled in."""
        if tokens_per_step(self.config.token_layout) == tokens_before_action(self.config.token_layout):
            return memory
        return self.transformer.decode(self.embedding.after_action(now)[:, 0], memory)[1]

    def observe_and_act(
        self, memory: KVCache, past: ChainBatch, now: ChainBatch, keys: Shaped[PRNGKeyArray, " B"] | None = None
    ) -> tuple[Float[Array, "B A"], KVCache]:
        """`act` after `observe`, reading the memory once instead of twice."""
        tokens = jnp.concatenate([self.embedding.after_action(past), self.embedding.before_action(now)], axis=2)
        x_BnM, memory = self.transformer.decode(tokens[:, 0], memory)
        return chosen(self.action_head(x_BnM[:, -1]), keys), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class BehaviourCloningConfig:
    """A multilayer perceptron from observation to action.

    Attributes:
        name: Tells the kinds of models apart in a checkpoint.
        hidden_widths: One hidden layer each.
        observation_dim: O.
        action_dim: A.
        normalisation: Scales taken from the data.
        action_head: How actions are read off the last hidden layer.
    """

    name: Literal["behaviour_cloning"]
    hidden_widths: tuple[int, ...]
    action_head: ActionHeadConfig
    observation_dim: int
    action_dim: int
    normalisation: Normalisation


class BehaviourCloning(MemorylessAgent):
    """Imitates the actions of its data, blind to returns and to the past."""

    def __init__(self, config: BehaviourCloningConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (config.observation_dim, *config.hidden_widths)
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.action_head = ActionHead(config.action_head, width=widths[-1], action_dim=config.action_dim, rngs=rngs)

    def __call__(
        self, batch: ChainBatch, parallel: SequenceParallel, *, dropout_key: PRNGKeyArray | None = None
    ) -> ActionDistribution:
        """Distributions [B T] over the action of every step, each from its own observation; nothing is dropped."""
        del dropout_key
        return self._distribution(parallel.constrain(batch.observations))

    def decide(self, observations: Float[Array, "B O"], keys: Shaped[PRNGKeyArray, " B"] | None) -> Float[Array, "B A"]:
        """The mode, or with keys a draw."""
        return chosen(self._distribution(observations), keys)

    def _distribution(self, observations: Float[Array, "*b O"]) -> ActionDistribution:
        x = self.config.normalisation.observations(observations)
        for layer in self.hidden:
            x = jax.nn.gelu(layer(x))
        return self.action_head(x)


def chosen(distribution: ActionDistribution, keys: Shaped[PRNGKeyArray, " B"] | None) -> Float[Array, "B A"]:
    """The mode of each row, or with keys a draw, which depends on the row's own distribution and key alone."""
    if keys is None:
        return distribution.mode()
    return jax.vmap(lambda row, key: row.sample(key))(distribution, keys)


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
