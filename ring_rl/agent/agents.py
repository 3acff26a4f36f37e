"""The agents that can be trained: what they read, how large they are, and which model that makes."""

import dataclasses
from typing import Literal

from ring_rl.agent.action_heads import ActionHeadConfig
from ring_rl.agent.episodes.exorl import EpisodeSet, select_best_fraction
from ring_rl.agent.episodes.load import normalisation_of
from ring_rl.agent.hindsight import ChainConfig
from ring_rl.agent.model import BehaviourCloningConfig, ModelConfig, SequenceModelConfig
from ring_rl.agent.td3_bc.task import TD3BCAgentConfig
from ring_rl.agent.tokens import Normalisation, TimeEmbedding, TokenLayout
from ring_rl.nn.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceAgentConfig:
    """An agent that acts on returns and context.

    Attributes:
        name: "agentic_transformer" reads chains; "decision_transformer" one trajectory with its own return.
        best_fraction: The part of the data, best by return, that it learns from; 1 is all.
        chain: How chains are drawn.
        token_layout: How a step becomes tokens.
        previous_step_in_token: Whether a fused token also holds the previous action and reward.
        return_octaves: Octaves of the return-to-go's Fourier features.
        time_embedding: How the time within the episode enters: as Fourier features, as a vector learned for each
            step, or not at all.
        time_octaves: Octaves of the episode time's Fourier features.
        trajectory_embedding: Whether tokens say which trajectory of their chain they belong to.
        embedding_dropout: Share of the embedded tokens' entries that training sets to zero.
        action_head: How actions are read off the trunk.
        transformer: The size of the trunk.
    """

    name: Literal["agentic_transformer", "decision_transformer"]
    best_fraction: float
    chain: ChainConfig
    token_layout: TokenLayout
    previous_step_in_token: bool
    return_octaves: int
    time_embedding: TimeEmbedding
    time_octaves: int
    trajectory_embedding: bool
    embedding_dropout: float
    action_head: ActionHeadConfig
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        for name in ("return_octaves", "time_octaves"):
            if getattr(self, name) < 0:
                raise ValueError(f"agent.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"agent.embedding_dropout must lie in [0, 1), got {self.embedding_dropout}")
        if self.previous_step_in_token and self.token_layout != "fused":
            raise ValueError(
                f"agent.previous_step_in_token=true is for token_layout=fused; {self.token_layout} has tokens for the "
                "action of their own; set it to false"
            )
        if self.name == "decision_transformer" and self.chain.trajectories != 1:
            raise ValueError(
                f"a decision transformer reads one trajectory, got agent.chain.trajectories="
                f"{self.chain.trajectories}; set it to 1 or use agent=agentic_transformer"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BehaviourCloningAgentConfig:
    """An agent that imitates good data step by step; with best_fraction 0.1 it is the literature's BC-10%.

    Attributes:
        name: "behaviour_cloning".
        best_fraction: The part of the data, best by return, that it imitates.
        chain: How trajectories are drawn; chains of one.
        hidden_widths: Hidden layers of its perceptron.
        action_head: How actions are read off the last of them.
    """

    name: Literal["behaviour_cloning"]
    best_fraction: float
    chain: ChainConfig
    hidden_widths: tuple[int, ...]
    action_head: ActionHeadConfig


ImitationAgentConfig = SequenceAgentConfig | BehaviourCloningAgentConfig
AgentConfig = ImitationAgentConfig | TD3BCAgentConfig


def training_episodes(config: ImitationAgentConfig, episodes: EpisodeSet) -> EpisodeSet:
    """What this agent learns from."""
    return episodes if config.best_fraction == 1 else select_best_fraction(episodes, config.best_fraction)


def model_config(
    config: ImitationAgentConfig, episodes: EpisodeSet, *, episode_steps: int | None = None
) -> ModelConfig:
    """The model for `episodes`, the whole data set: agents on one data set share their normalisation.

    It has room for episodes of `episode_steps` decisions, where episodes may last longer than any in the data.
    """
    normalisation = normalisation_of(episodes)
    if isinstance(config, BehaviourCloningAgentConfig):
        return BehaviourCloningConfig(
            name="behaviour_cloning",
            hidden_widths=config.hidden_widths,
            action_head=config.action_head,
            observation_dim=episodes.observation_dim,
            action_dim=episodes.action_dim,
            normalisation=normalisation,
        )
    return sequence_model_config(
        config,
        episode_steps=max(int(episodes.lengths.max()), episode_steps or 1),
        observation_dim=episodes.observation_dim,
        action_dim=episodes.action_dim,
        normalisation=normalisation,
    )


def sequence_model_config(
    config: SequenceAgentConfig,
    *,
    episode_steps: int,
    observation_dim: int,
    action_dim: int,
    normalisation: Normalisation,
) -> SequenceModelConfig:
    """The model of an agent, for episodes of these sizes."""
    return SequenceModelConfig(
        name="sequence",
        token_layout=config.token_layout,
        previous_step_in_token=config.previous_step_in_token,
        return_octaves=config.return_octaves,
        time_embedding=config.time_embedding,
        time_octaves=config.time_octaves,
        trajectory_embedding=config.trajectory_embedding,
        embedding_dropout=config.embedding_dropout,
        action_head=config.action_head,
        trajectories=config.chain.trajectories,
        episode_steps=episode_steps,
        observation_dim=observation_dim,
        action_dim=action_dim,
        normalisation=normalisation,
        transformer=config.transformer,
    )
