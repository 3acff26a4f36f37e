"""Optimizers and their learning-rate schedule.

To add one: a dataclass below `ScheduledOptimizer` with its own numbers, `name` and `update_rule`, listed in
`OptimizerConfig`, and a file in conf/optimizer. Schedules, clipping and the rule for weight decay come with it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ring_rl.typing import Array, Float32, PyTree

__all__ = [
    "AdafactorConfig",
    "AdamWConfig",
    "LionConfig",
    "OptimizerConfig",
    "ScheduledOptimizer",
    "learning_rate_at",
    "make_optimizer",
    "weight_decay_mask",
]

# A parameter whose own name ends with one of these is a vector per unit, however many layers are stacked.
_NAMES_WITHOUT_DECAY = ("bias", "scale")

LearningRate = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledOptimizer(abc.ABC):
    """What all optimizers share: linear warm-up, a decay schedule, weight decay, clipping by the global norm.

    Attributes:
        learning_rate: the peak, reached at the end of the warm-up.
        weight_decay: decoupled decay, multiplied by the learning rate.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: what follows the warm-up.
        final_learning_rate_fraction: the learning rate at the last step, as a fraction of the peak; it says
            nothing to the schedule "constant".
        gradient_clip_norm: largest global norm of the gradient; null leaves it unclipped.
    """

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    schedule: Literal["constant", "cosine", "linear"]
    final_learning_rate_fraction: float
    gradient_clip_norm: float | None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0 <= self.final_learning_rate_fraction <= 1:
            raise ValueError(
                f"final_learning_rate_fraction must lie in [0, 1], got {self.final_learning_rate_fraction}"
            )
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0:
            raise ValueError(
                f"gradient_clip_norm must be positive, got {self.gradient_clip_norm}; null turns clipping off"
            )

    @abc.abstractmethod
    def update_rule(self, learning_rate: LearningRate) -> optax.GradientTransformation:
        """The update from the clipped gradient, weight decay and learning rate (a function of the step) included."""

    def _check_decay_rates(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithBetas(ScheduledOptimizer):
    """An update rule with two decay rates."""

    beta1: float
    beta2: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decay_rates("beta1", "beta2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig(_WithBetas):
    """AdamW (arXiv:1711.05101). State: two numbers a parameter.

    Attributes:
        name: tells the optimizers apart.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
    """

    name: Literal["adamw"]

    def update_rule(self, learning_rate: LearningRate) -> optax.GradientTransformation:
        """learning_rate (m / (sqrt(v) + 1e-8) + weight_decay p)."""
        return optax.adamw(
            learning_rate, b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay, mask=weight_decay_mask
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LionConfig(_WithBetas):
    """Lion (arXiv:2302.06675): the sign of a momentum. State: one number a parameter.

    Every update has the size of the learning rate: take a rate 3 to 10 times smaller than AdamW's, and a weight
    decay as many times larger.

    Attributes:
        name: tells the optimizers apart.
        beta1: share of the momentum in the direction whose sign is taken.
        beta2: decay rate of the momentum.
    """

    name: Literal["lion"]

    def update_rule(self, learning_rate: LearningRate) -> optax.GradientTransformation:
        """learning_rate (sign(beta1 m + (1 - beta1) g) + weight_decay p)."""
        return optax.lion(
            learning_rate, b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay, mask=weight_decay_mask
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdafactorConfig(ScheduledOptimizer):
    """Adafactor (arXiv:1804.04235) without momentum. State: a row and a column of sums for each matrix.

    The learning rate is absolute, not relative to the size of a parameter as in the paper's section 8. The clip is
    of the root mean square over a parameter, all layers of a stack together.

    Attributes:
        name: tells the optimizers apart.
        decay_exponent: the second moment decays at 1 - t ** -decay_exponent.
        smallest_factored_dimension: matrices with a smaller dimension keep their second moment whole.
        update_clip: largest root mean square of a parameter's update before the learning rate; null: no clip.
    """

    name: Literal["adafactor"]
    decay_exponent: float
    smallest_factored_dimension: int
    update_clip: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay_exponent <= 1:
            raise ValueError(f"decay_exponent must lie in (0, 1], got {self.decay_exponent}")
        if self.smallest_factored_dimension < 1:
            raise ValueError(f"smallest_factored_dimension must be at least 1, got {self.smallest_factored_dimension}")
        if self.update_clip is not None and not self.update_clip > 0:
            raise ValueError(f"update_clip must be positive, got {self.update_clip}; null turns it off")

    def update_rule(self, learning_rate: LearningRate) -> optax.GradientTransformation:
        """learning_rate (clip(g / sqrt(row column / mean)) + weight_decay p)."""
        return optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.decay_exponent, min_dim_size_to_factor=self.smallest_factored_dimension
            ),
            optax.identity() if self.update_clip is None else optax.clip_by_block_rms(self.update_clip),
            optax.add_decayed_weights(self.weight_decay, mask=weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )


OptimizerConfig = AdamWConfig | LionConfig | AdafactorConfig


def learning_rate_at(config: ScheduledOptimizer, step: ArrayLike, total_steps: int) -> Float32[Array, ""]:
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


def make_optimizer(
    config: ScheduledOptimizer, *, total_steps: int, first_update: int = 0
) -> optax.GradientTransformation:
    """Clip by the global norm, then the optimizer's rule with the schedule of `learning_rate_at`.

    Weight decay spares every parameter whose name ends with "bias" or "scale" (`weight_decay_mask`).

    Args:
        config: rule and schedule.
        total_steps: that the schedule spans.
        first_update: updates that the optimizer's state has seen when the schedule begins: a later stage of training
            keeps the moments and has a schedule of its own.

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
    rule = config.update_rule(lambda step: learning_rate_at(config, step - first_update, total_steps))
    if config.gradient_clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), rule)


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
