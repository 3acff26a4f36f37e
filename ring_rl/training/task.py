"""What a task brings to a run: most bring a model, a loss and rows; one that learns otherwise brings its own step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.input import BatchStream, InputConfig, RowSource, RowStream
from ring_rl.training.mesh import batch_sharding
from ring_rl.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from ring_rl.training.state import TrainState, abstract_state, create_state
from ring_rl.training.step import LossFunction, TrainStep, make_train_step
from ring_rl.typing import PyTree

__all__ = ["PreparedTask", "RunStream", "Task", "TrainingTask"]


class RunStream(BatchStream, Protocol):
    """A `BatchStream` whose shapes are known ahead of its batches, and that goes on where another ended."""

    @property
    def abstract_batch(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of a batch, for compiling ahead of the data."""
        ...

    def start(self) -> None:
        """Begin to prepare batches."""
        ...

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Go on from a state that `state` gave."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """A task made ready for one run; nothing of it is allocated or compiled yet, save the stream's shapes.

    Attributes:
        stream: batches, one a step.
        abstract_state: shapes, types and shardings of the state.
        create_state: makes the state that training begins with.
        step: the update; its metrics hold "loss".
    """

    stream: RunStream
    abstract_state: TrainState
    create_state: Callable[[], TrainState]
    step: TrainStep


class Task(Protocol):
    """What `run_training` trains. `TrainingTask` is the usual one; another way to learn is another `prepare`."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The plain mapping that the model is built from; checkpoints carry it."""
        ...

    @property
    def memory_choices(self) -> tuple[str, ...]:
        """Dotted paths of it that say in what memory the model computes, and not what."""
        ...

    @property
    def parallel(self) -> SequenceParallel:
        """The mesh that the run computes on, and what its axes are for."""
        ...

    @property
    def tokens(self) -> int:
        """Of all that one step reads, padding included."""
        ...

    @property
    def model_flops(self) -> Callable[[nnx.State], int]:
        """Of a step, as a function of the parameters; arrays or `jax.ShapeDtypeStruct`s serve."""
        ...

    @property
    def extra(self) -> Mapping[str, Any]:
        """Plain JSON that every checkpoint carries."""
        ...

    def prepare(
        self, *, seed: int, steps: int, optimizer: OptimizerConfig, accumulation_steps: int, input: InputConfig
    ) -> PreparedTask:
        """Made ready for a run of `steps` steps, whose state and randomness are functions of `seed`.

        Raises:
            ValueError: the mesh cannot share the task.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A task that descends the gradient of one loss; see `Task`.

    Attributes:
        make_model: builds the model from random streams.
        model_config: the plain mapping that the model is built from; checkpoints carry it.
        memory_choices: dotted paths of it that say in what memory the model computes, and not what: a run may go on
            with others, as it may on another mesh.
        loss_function: of a global batch, as `make_train_step` takes it.
        rows: makes the rows of a batch.
        batch_size: rows of a global batch.
        parallel: the mesh that the run computes on, and what its axes are for.
        tokens: of the global batch, padding included.
        model_flops: of a step, as a function of the parameters; arrays or `jax.ShapeDtypeStruct`s serve.
        extra: plain JSON that every checkpoint carries.
    """

    make_model: Callable[[nnx.Rngs], nnx.Module]
    model_config: Mapping[str, Any]
    memory_choices: tuple[str, ...]
    loss_function: LossFunction
    rows: RowSource
    batch_size: int
    parallel: SequenceParallel
    tokens: int
    model_flops: Callable[[nnx.State], int]
    extra: Mapping[str, Any]

    def prepare(
        self,
        *,
        seed: int,
        steps: int,
        optimizer: OptimizerConfig,
        accumulation_steps: int,
        input: InputConfig,
        first_step: int = 0,
        first_update: int = 0,
    ) -> PreparedTask:
        """Rows cut to the mesh, a state sharded over it, and the step of `make_train_step`.

        A stage of a longer training begins after step `first_step`, with an optimizer that has seen `first_update`
        updates (fewer where its moments began anew); `steps` and the schedule are the stage's own.
        """
        mesh, weight_axes = self.parallel.mesh, self.parallel.weight_axes
        stream = RowStream(
            self.rows,
            batch_size=self.batch_size,
            steps=first_step + steps,
            mesh=mesh,
            layout=self.parallel.layout,
            ring_size=self.parallel.ring_size,
            config=input,
        )
        batch_sharding(mesh, stream.abstract_batch, accumulation_steps=accumulation_steps)
        transformation = make_optimizer(optimizer, total_steps=steps, first_update=first_update)
        graphdef, abstract = abstract_state(self.make_model, transformation, mesh=mesh, weight_axes=weight_axes)
        step = make_train_step(
            self.loss_function,
            graphdef,
            transformation,
            mesh,
            seed=seed,
            accumulation_steps=accumulation_steps,
            learning_rate=lambda step: learning_rate_at(optimizer, step - first_step, steps),
        )
        return PreparedTask(
            stream=stream,
            abstract_state=abstract,
            create_state=lambda: create_state(
                self.make_model, transformation, seed=seed, mesh=mesh, weight_axes=weight_axes
            )[1],
            step=step,
        )
