"""TD3+BC as a task of the training engine."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import optax
from flax import nnx

from ring_rl.agent.episodes.episode_set import EpisodeSet
from ring_rl.agent.episodes.load import normalisation_of
from ring_rl.agent.td3_bc.losses import LearningConfig
from ring_rl.agent.td3_bc.networks import TD3BC, TD3BCConfig
from ring_rl.agent.td3_bc.transitions import ResidentStream, Transitions, transitions_of
from ring_rl.agent.td3_bc.update import Optimizers, initial_state, make_update_step
from ring_rl.config import to_mapping
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.flops import matmul_parameters
from ring_rl.training.input import InputConfig
from ring_rl.training.mesh import replicated
from ring_rl.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from ring_rl.training.state import TrainState, abstract_state
from ring_rl.training.task import PreparedTask

__all__ = ["TD3BCAgentConfig", "TD3BCTask", "make_td3_bc_task"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TD3BCAgentConfig:
    """An agent that learns values, and acts on them near its data.

    Attributes:
        name: "td3_bc".
        hidden_widths: Hidden layers of the actor and of each critic.
        updates_per_step: Critic updates in one step of the training loop, one call of the device.
        learning: The method's numbers.
    """

    name: Literal["td3_bc"]
    hidden_widths: tuple[int, ...]
    updates_per_step: int
    learning: LearningConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TD3BCTask:
    """A `ring_rl.training.task.Task`: its step is `updates_per_step` updates, and its batch the whole data set.

    Attributes:
        agent: What learns.
        model: Its networks.
        transitions: What from.
        batch_size: Transitions in a minibatch.
        parallel: A mesh of one device.
        extra: Plain JSON that every checkpoint carries.
    """

    agent: TD3BCAgentConfig
    model: TD3BCConfig
    transitions: Transitions
    batch_size: int
    parallel: SequenceParallel
    extra: Mapping[str, Any]

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The networks' sizes and scales."""
        return to_mapping(self.model)

    @property
    def memory_choices(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def tokens(self) -> int:
        """Transitions that a step draws."""
        return self.batch_size * self.agent.updates_per_step

    @property
    def model_flops(self) -> Callable[[nnx.State], int]:
        """2 P B for every pass through P weights, 4 P B for one backward, of a whole step."""
        return partial(_model_flops, batch_size=self.batch_size, agent=self.agent)

    def prepare(
        self, *, seed: int, steps: int, optimizer: OptimizerConfig, accumulation_steps: int, input: InputConfig
    ) -> PreparedTask:
        """See `Task`; schedules and warm-up of `optimizer` count the updates of the network that they move."""
        del input
        if accumulation_steps != 1:
            raise ValueError(f"agent=td3_bc takes no microbatches, got accumulation_steps={accumulation_steps}; set 1")
        mesh, updates = self.parallel.mesh, steps * self.agent.updates_per_step
        optimizers = Optimizers(
            actor=make_optimizer(optimizer, total_steps=max(updates // self.agent.learning.actor_delay, 1)),
            critics=make_optimizer(optimizer, total_steps=updates),
        )
        make_model = lambda rngs: TD3BC(self.model, rngs=rngs)  # noqa: E731
        graphdef, _ = abstract_state(make_model, optax.identity(), mesh=mesh)
        begin = partial(initial_state, make_model, optimizers, seed=seed, mesh=mesh)
        return PreparedTask(
            stream=ResidentStream(self.transitions, mesh, steps),
            abstract_state=_laid_out(jax.eval_shape(begin), self.parallel),
            create_state=begin,
            step=make_update_step(
                graphdef,
                optimizers,
                mesh,
                config=self.agent.learning,
                seed=seed,
                batch_size=self.batch_size,
                updates=self.agent.updates_per_step,
                learning_rate=lambda update: learning_rate_at(optimizer, update, updates),
            ),
        )


def make_td3_bc_task(
    agent: TD3BCAgentConfig,
    episodes: EpisodeSet,
    *,
    batch_size: int,
    parallel: SequenceParallel,
    extra: Mapping[str, Any],
) -> TD3BCTask:
    """The task of training `agent` on all of `episodes`.

    Raises:
        ValueError: a mesh of several devices, an empty minibatch.
    """
    if parallel.mesh.size != 1:
        axes = " ".join(f"{axis}={size}" for axis, size in parallel.mesh.shape.items() if size > 1)
        raise ValueError(f"agent=td3_bc trains on one device, the mesh has {axes}; set mesh.sp=1 and the others to 1")
    if batch_size < 1:
        raise ValueError(f"batch.batch_size must be at least 1, got {batch_size}")
    return TD3BCTask(
        agent=agent,
        model=TD3BCConfig(
            name="td3_bc",
            hidden_widths=agent.hidden_widths,
            observation_dim=episodes.observation_dim,
            action_dim=episodes.action_dim,
            normalisation=normalisation_of(episodes),
        ),
        transitions=transitions_of(episodes),
        batch_size=batch_size,
        parallel=parallel,
        extra=extra,
    )


def _model_flops(parameters: nnx.State, *, batch_size: int, agent: TD3BCAgentConfig) -> int:
    actor, critics = matmul_parameters(parameters["actor"]), matmul_parameters(parameters["critics"])
    # Target actor and target critics forward; critics forward and backward.
    critic_update = 2 * actor + 2 * critics + 6 * critics
    # Actor and first critic forward, back through the critic's inputs only, actor backward.
    actor_update = 6 * actor + 4 * critics // 2
    updates = agent.updates_per_step
    return batch_size * (updates * critic_update + updates // agent.learning.actor_delay * actor_update)


def _laid_out(state: TrainState, parallel: SequenceParallel) -> TrainState:
    sharding = replicated(parallel.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
