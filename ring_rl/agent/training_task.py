"""What training an agent brings to a run: its model, its loss, and the rows of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ring_rl.agent.agents import AgentConfig, ImitationAgentConfig, SequenceAgentConfig, model_config, training_episodes
from ring_rl.agent.chain_batch import BatchLayout, ChainSampler
from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.agent.loss import make_action_loss
from ring_rl.agent.model import check_token_layout, make_model
from ring_rl.agent.td3_bc.task import TD3BCAgentConfig, make_td3_bc_task
from ring_rl.agent.work import model_flops, tokens_per_chain
from ring_rl.config import to_mapping
from ring_rl.kernels.layout import Layout
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer import MEMORY_CHOICES
from ring_rl.training.task import Task, TrainingTask

__all__ = ["BatchConfig", "make_task", "make_training_task"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How a batch is cut to the mesh; see `BatchLayout`."""

    batch_size: int
    layout: Layout
    pad_to_ring: bool


def make_task(
    agent: AgentConfig,
    episodes: EpisodeSet,
    *,
    batch: BatchConfig,
    parallel: SequenceParallel,
    seed: int,
    extra: Mapping[str, Any],
    episode_steps: int | None = None,
) -> Task:
    """The task of training `agent`, of whatever kind, on `episodes`; see `make_training_task`."""
    if isinstance(agent, TD3BCAgentConfig):
        return make_td3_bc_task(agent, episodes, batch_size=batch.batch_size, parallel=parallel, extra=extra)
    return make_training_task(
        agent, episodes, batch=batch, parallel=parallel, seed=seed, extra=extra, episode_steps=episode_steps
    )


def make_training_task(
    agent: ImitationAgentConfig,
    episodes: EpisodeSet,
    *,
    batch: BatchConfig,
    parallel: SequenceParallel,
    seed: int,
    extra: Mapping[str, Any],
    episode_steps: int | None = None,
) -> TrainingTask:
    """The task of training an agent that imitates `episodes`.

    Args:
        agent: what learns.
        episodes: the whole data set; the agent's own `best_fraction` of it is what it learns from.
        batch: how chains are cut to the mesh.
        parallel: the mesh, in the batch's layout.
        seed: of the order in which chains are drawn.
        extra: plain JSON that every checkpoint carries.
        episode_steps: decisions that an episode may last; None: as many as the longest in the data.

    Raises:
        ValueError: the mesh cannot share the batch, the chains or the model.
    """
    model = model_config(agent, episodes, episode_steps=episode_steps)
    sampler = ChainSampler(
        training_episodes(agent, episodes),
        agent.chain,
        BatchLayout(ring_size=parallel.ring_size, **dataclasses.asdict(batch)),
        seed=seed,
    )
    tokens = tokens_per_chain(model, steps=sampler.steps)
    if isinstance(agent, SequenceAgentConfig):
        check_token_layout(agent.token_layout, parallel)
        agent.transformer.check(parallel, batch=batch.batch_size, length=tokens)
    return TrainingTask(
        make_model=lambda rngs: make_model(model, rngs),
        model_config=to_mapping(model),
        memory_choices=tuple(f"transformer.{name}" for name in MEMORY_CHOICES),
        loss_function=make_action_loss(parallel),
        rows=sampler,
        batch_size=batch.batch_size,
        parallel=parallel,
        tokens=batch.batch_size * tokens,
        model_flops=lambda parameters: model_flops(model, parameters, batch_size=batch.batch_size, steps=sampler.steps),
        extra=extra,
    )
