"""The training step: a loss function and an optimizer become one jitted, donating update."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ring_rl.training.mesh import batch_sharding, replicated
from ring_rl.training.microbatches import sum_over_microbatches
from ring_rl.training.state import TrainState, noise_key
from ring_rl.typing import Array, Float32, PRNGKeyArray, PyTree

__all__ = ["Loss", "LossFunction", "TrainStep", "compile_step", "compiled_report", "make_train_step"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """Sums over a batch and what to divide them by, so that a mean over padded or packed rows stays exact.

    Attributes:
        total: the SUM of the losses.
        weight: how many losses it sums (a count, or a sum of weights).
        metrics: name to (sum, weight), reported as sum / weight.
    """

    total: Float32[Array, ""]
    weight: Float32[Array, ""]
    metrics: Mapping[str, tuple[Float32[Array, ""], Float32[Array, ""]]]


class LossFunction(Protocol):
    """What a task provides: the loss of a model on a global batch."""

    def __call__(self, model: Any, batch: Any, key: PRNGKeyArray, /) -> Loss:
        """`key` differs at every step; it feeds dropout and the like."""
        ...


class TrainStep(Protocol):
    """A jitted step. It donates the state: use the returned one, the one passed is gone."""

    def __call__(self, state: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
        """One update and its metrics, which stay on the device until they are read."""
        ...

    def lower(self, state: Any, batch: Any, /) -> jax.stages.Lowered:
        """The traced step, for `compile_step`; arrays or `jax.ShapeDtypeStruct`s serve."""
        ...


def make_train_step(
    loss_function: LossFunction,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    accumulation_steps: int = 1,
    learning_rate: Callable[[Array], Float32[Array, ""]] | None = None,
) -> TrainStep:
    """Build `step(state, batch) -> (state, metrics)`, jitted over the mesh, with the state donated.

    The loss is total / weight over the whole batch, on however many devices it lies: the batch is a global
    sharded array, so XLA makes its sums global. A batch of weight 0 has loss 0 and gradient 0. The metrics
    are the loss function's own, and `loss`, `loss_weight`, `gradient_norm` (before clipping) and, where the
    schedule is given, `learning_rate`. Step s draws its randomness from fold_in(noise_key(seed), s).

    With k accumulation steps each device cuts its own rows into k microbatches, which run one after another in
    the memory of one. Totals, weights and gradients of the totals are summed in float32 and divided once, so the
    result is that of k = 1 up to rounding, however unevenly the weights fall. Microbatch i draws from the step's
    key folded with i.

    Args:
        loss_function: called as `loss_function(model, batch, key)`.
        graphdef: the model's static part, from `create_state`.
        optimizer: the one that `create_state` initialised.
        mesh: the mesh that the state and the batches lie on. The new state is sharded as the first one is.
        seed: of the randomness inside the loss function.
        accumulation_steps: k; the rows of each device must be divisible by it.
        learning_rate: the schedule, a function of the step, for reporting only.

    Raises:
        ValueError: accumulation_steps is below 1; or, at the first call, a batch is not divisible by the mesh and
            the accumulation steps, or a metric of the loss function takes one of the names above.
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}; 1 accumulates nothing")

    def step_function(
        state: TrainState, batch: PyTree[Any], *, gradient_shardings: PyTree[NamedSharding]
    ) -> tuple[TrainState, dict[str, Array]]:
        batch_shardings = batch_sharding(mesh, batch, accumulation_steps=accumulation_steps)
        batch = jax.lax.with_sharding_constraint(batch, batch_shardings)

        def gradient_of_total(batch: Any, key: PRNGKeyArray) -> tuple[Any, Loss]:
            def total_loss(parameters: Any) -> tuple[Array, Loss]:
                loss = loss_function(nnx.merge(graphdef, parameters), batch, key)
                return loss.total, loss

            gradients, loss = jax.grad(total_loss, has_aux=True)(state.parameters)
            # Said here, XLA can scatter a gradient as soon as it is known instead of summing it in full everywhere.
            return jax.lax.with_sharding_constraint(gradients, gradient_shardings), loss

        key = jax.random.fold_in(noise_key(seed), state.step)
        gradient_sums, loss = sum_over_microbatches(gradient_of_total, batch, key, mesh=mesh, steps=accumulation_steps)
        gradients = jax.tree.map(lambda total: _mean(total, loss.weight), gradient_sums)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        metrics = {
            "loss": _mean(loss.total, loss.weight),
            "loss_weight": loss.weight,
            "gradient_norm": optax.tree.norm(gradients),
        }
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.step)
        if taken := sorted(metrics.keys() & loss.metrics.keys()):
            raise ValueError(f"the step reports {', '.join(taken)} itself; rename the loss function's metric")
        metrics |= {name: _mean(total, weight) for name, (total, weight) in loss.metrics.items()}
        return TrainState(state.step + 1, parameters, optimizer_state), metrics

    return _ShardedStep(step_function, mesh)


class _ShardedStep:
    """`jax.jit` of a step, whose out_shardings follow from the first state it sees.

    Without them XLA is free to lay a parameter out in another way, and the next call would compile again.
    """

    def __init__(self, step_function: Callable[..., Any], mesh: Mesh):
        self._step_function, self._mesh = step_function, mesh
        self._step: Any = None

    def __call__(self, state: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Array]]:
        return self._jitted(state)(state, batch)

    def lower(self, state: Any, batch: Any, /) -> jax.stages.Lowered:
        return self._jitted(state).lower(state, batch)

    def _jitted(self, state: TrainState) -> Any:
        if self._step is None:
            shardings = jax.tree.map(self._sharding_of, state)
            self._step = jax.jit(
                partial(self._step_function, gradient_shardings=shardings.parameters),
                donate_argnums=0,
                out_shardings=(shardings, replicated(self._mesh)),
            )
        return self._step

    def _sharding_of(self, leaf: Any) -> NamedSharding:
        sharding = leaf.sharding
        return sharding if isinstance(sharding, NamedSharding) else replicated(self._mesh)


def compile_step(step: TrainStep, state: Any, batch: Any) -> jax.stages.Compiled:
    """Compile the step without running it: its memory and its HLO are known before any data is."""
    return step.lower(state, batch).compile()


def compiled_report(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device, and how many collective-permutes (a ring's hops) the program holds.

    A permute inside a loop counts once, however often the loop runs. Bytes are those of XLA's own analysis:
    `argument_bytes`, `output_bytes`, `temporary_bytes` and `peak_bytes`.

    Raises:
        ValueError: the backend does not analyse memory.
    """
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    if memory is None or text is None:
        raise ValueError("this backend reports neither memory nor HLO for a compiled step; use cpu, gpu or tpu")
    return {
        "argument_bytes": int(memory.argument_size_in_bytes),
        "output_bytes": int(memory.output_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "peak_bytes": int(memory.peak_memory_in_bytes),
        # An asynchronous permute is a pair start, done; only the start is counted.
        "collective_permutes": len(re.findall(r"\bcollective-permute(?:-start)?\(", text)),
    }


def _mean(total: Array, weight: Array) -> Array:
    """total / weight, and 0 where the weight is 0, with a gradient that is 0 there too."""
    present = weight > 0
    return jnp.where(present, total / jnp.where(present, weight, 1.0), 0.0)
