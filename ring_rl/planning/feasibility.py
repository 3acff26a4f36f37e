"""What is known of a step before it is compiled: whether it can run at all, and about how long a context may be."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from flax import nnx

from ring_rl.kernels.strategies.ulysses import check_heads
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.planning.compiled_step import StepRequest
from ring_rl.planning.topology import Machine
from ring_rl.training.optimizer import OptimizerConfig, make_optimizer

__all__ = ["ModelSizes", "first_guess", "model_sizes", "problem_of"]

_GRADIENT_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Of a model and its optimizer.

    Attributes:
        parameters: Numbers that are trained, over all devices.
        state_bytes: Parameters and moments on a device that shares them evenly with all others: the least it can hold.
    """

    parameters: int
    state_bytes: int


def model_sizes(request: StepRequest, *, devices: int) -> ModelSizes:
    """Counted on shapes; nothing is made."""
    # What a model computes in changes none of its parameters: count each once.
    plain = dataclasses.replace(
        request.model.transformer, feed_forward_chunks=1, saved_activations="none", compute_dtype="float32"
    )
    parameters, state = _counted(dataclasses.replace(request.model, transformer=plain), request.optimizer)
    return ModelSizes(parameters=parameters, state_bytes=state // devices)


@functools.lru_cache(maxsize=256)
def _counted(model: LanguageModelConfig, optimizer_config: OptimizerConfig) -> tuple[int, int]:
    """Parameters, and bytes of parameters and moments."""
    optimizer = make_optimizer(optimizer_config, total_steps=optimizer_config.warmup_steps + 1)
    parameters = nnx.eval_shape(lambda: nnx.state(LanguageModel(model, rngs=nnx.Rngs(0)), nnx.Param))
    arrays = jax.tree.leaves((parameters, jax.eval_shape(optimizer.init, parameters)))
    count = sum(math.prod(array.shape) for array in jax.tree.leaves(parameters))
    return count, sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def problem_of(request: StepRequest, machine: Machine) -> str | None:
    """Why a step cannot run on a machine, whatever its context, in a line; None where it may."""
    transformer, mesh = request.model.transformer, request.mesh
    if mesh.dp * mesh.fsdp * mesh.tp * mesh.sp != machine.devices:
        return (
            f"{machine.devices} devices do not divide into groups of {mesh.tp * mesh.sp}: tp={mesh.tp} x sp={mesh.sp}"
        )
    if mesh.sp % request.ulysses_size:
        return f"ulysses_size={request.ulysses_size} does not divide sp={mesh.sp} devices"
    shared = {
        "query_heads": transformer.query_heads,
        "key_value_heads": transformer.key_value_heads,
        "feed_forward_width": transformer.feed_forward_width,
        "vocabulary_size": request.model.vocabulary_size,
    }
    for name, size in shared.items():
        if size % mesh.tp:
            return f"tp={mesh.tp} does not divide {name}={size}"
    exchanging = {"ulysses": mesh.sp, "hybrid": request.ulysses_size}.get(request.strategy, 1)
    try:
        check_heads(
            query_heads=transformer.query_heads // mesh.tp,
            key_value_heads=transformer.key_value_heads // mesh.tp,
            devices=exchanging,
        )
    except ValueError as error:
        return str(error)
    state_bytes = model_sizes(request, devices=machine.devices).state_bytes
    if state_bytes > machine.memory_bytes:
        return (
            f"parameters and moments alone take {state_bytes / 1e9:.1f} GB on each of {machine.devices} devices, "
            f"which have {machine.memory_bytes / 1e9:.1f}"
        )
    return None


def first_guess(request: StepRequest, machine: Machine) -> int:
    """Tokens a device of the right order, rather too many: layers' saved inputs, or scores, in all that is free."""
    transformer = request.model.transformer
    sizes = model_sizes(request, devices=machine.devices)
    free = machine.memory_bytes - sizes.state_bytes - _GRADIENT_BYTES * sizes.parameters // machine.devices
    free = max(free, machine.memory_bytes // 16)
    if request.strategy == "dense":
        # Scores, weights and their gradients, in float32.
        return int(math.sqrt(free / (4 * 4 * transformer.query_heads)))
    return int(free / ((2 if transformer.compute_dtype == "bfloat16" else 4) * transformer.layers * transformer.width))
