"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ring_rl.typing import Array, Float32, PyTree

__all__ = ["OptimizerConfig", "learning_rate_at", "make_optimizer", "weight_decay_mask"]

# A parameter whose own name ends with one of these is a vector per unit, however many layers are stacked.
_NAMES_WITHOUT_DECAY = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) with linear warm-up, a decay schedule and clipping by the global norm.

    Attributes:
        name: the update rule.
        learning_rate: the peak, reached at the end of the warm-up.
        weight_decay: decoupled decay, multiplied by the learning rate.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: what follows the warm-up.
        final_learning_rate_fraction: the learning rate at the last step, as a fraction of the peak; it says
            nothing to the schedule "constant".
        gradient_clip_norm: largest global norm of the gradient; null leaves it unclipped.
    """

    name: Literal["adamw"]
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    warmup_steps: int
    schedule: Literal["constant", "cosine", "linear"]
    final_learning_rate_fraction: float
    gradient_clip_norm: float | None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {beta}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.final_learning_rate_fraction <= 1:
            raise ValueError(
                f"final_learning_rate_fraction must lie in [0, 1], got {self.final_learning_rate_fraction}"
            )
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0:
            raise ValueError(
                f"gradient_clip_norm must be positive, got {self.gradient_clip_norm}; null turns clipping off"
            )


def learning_rate_at(config: OptimizerConfig, step: ArrayLike, total_steps: int) -> Float32[Array, ""]:
    """The learning rate of the update number `step`, counted from 0.

    Warm-up: peak * (step + 1) / warmup_steps, so that no update is spent at a rate of zero. After it, with
    p = (step - warmup_steps) / (total_steps - 1 - warmup_steps) and f the final fraction,
    linear: peak * (1 - (1 - f) p); cosine: peak * (f + (1 - f) (1 + cos(pi p)) / 2); constant: peak.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
    progress = jnp.clip((step - config.warmup_steps) / max(total_steps - 1 - config.warmup_steps, 1), 0.0, 1.0)
    if config.schedule == "constant":
        remaining = jnp.ones_like(progress)
    elif config.schedule == "linear":
        remaining = 1 - progress
    else:
        remaining = (1 + jnp.cos(jnp.pi * progress)) / 2
    final = config.final_learning_rate_fraction
    return (config.learning_rate * warmup * (final + (1 - final) * remaining)).astype(jnp.float32)


def make_optimizer(config: OptimizerConfig, *, total_steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW with the schedule of `learning_rate_at`.

    Weight decay spares every parameter whose name ends with "bias" or "scale" (`weight_decay_mask`).

    Raises:
        ValueError: the warm-up does not end before `total_steps`.
    """
    if total_steps < 1:
        raise ValueError(f"the number of training steps must be at least 1, got {total_steps}")
    if config.warmup_steps >= total_steps and config.warmup_steps > 0:
        raise ValueError(
            f"warmup_steps {config.warmup_steps} must be fewer than the {total_steps} training steps; "
            f"lower warmup_steps or train longer"
        )
    adamw = optax.adamw(
        lambda step: learning_rate_at(config, step, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=weight_decay_mask,
    )
    if config.gradient_clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), adamw)


def weight_decay_mask(parameters: PyTree[Any]) -> PyTree[bool]:
    """True where weight decay applies: everywhere but in parameters named "...bias" or "...scale".

    The name decides and not the number of dimensions, because scanning over layers stacks them: the bias [F]
    of one layer is [layers, F] in the stack and would pass for a matrix.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        # An nnx.State ends its paths with the Variable's own field; the names are the dictionary keys.
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return not (names and names[-1].endswith(_NAMES_WITHOUT_DECAY))

    return jax.tree_util.tree_map_with_path(decays, parameters)
