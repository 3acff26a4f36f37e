"""What training a language model brings to a run: its model, its loss, and the rows of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ring_rl.config import to_mapping
from ring_rl.lm.loss import make_language_loss
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.lm.work import model_flops
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer_config import MEMORY_CHOICES
from ring_rl.training.input import RowSource
from ring_rl.training.task import TrainingTask

__all__ = ["LANGUAGE_MAY_DIFFER", "LossConfig", "make_language_task"]

# Dotted paths of the entry point's configuration that may change besides `MAY_DIFFER` when a run goes on: in what
# memory the same is computed.
LANGUAGE_MAY_DIFFER = (
    "loss.chunks",
    *(f"model.{part}.{choice}" for part in ("transformer", "overrides") for choice in MEMORY_CHOICES),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss over the vocabulary.

    Attributes:
        chunks: Steps in which a device sees the logits of its tokens; divides their number.
        z_loss: Weight of log_sum_exp², which keeps logits from drifting.
    """

    chunks: int
    z_loss: float

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ValueError(f"loss.chunks must be at least 1, got {self.chunks}")
        if self.z_loss < 0:
            raise ValueError(f"loss.z_loss must not be negative, got {self.z_loss}")


def make_language_task(
    config: LanguageModelConfig,
    rows: RowSource,
    *,
    length: int,
    batch_size: int,
    loss: LossConfig,
    parallel: SequenceParallel,
    extra: Mapping[str, Any],
) -> TrainingTask:
    """The task of training a language model on rows of `length` tokens.

    Args:
        config: The model.
        rows: `TokenBatch`es without a batch axis, in natural order.
        length: T of a row.
        batch_size: Rows of a batch, over all devices.
        loss: How the loss is computed.
        parallel: The mesh, in the layout that batches are put into.
        extra: Plain JSON that every checkpoint carries.

    Raises:
        ValueError: The mesh cannot share the batch, the rows or the model.
    """
    config.transformer.check(parallel, batch=batch_size, length=length)
    if length // parallel.sequence_devices % loss.chunks:
        raise ValueError(
            f"loss.chunks={loss.chunks} does not divide the {length // parallel.sequence_devices} tokens of a device; "
            f"choose a divisor"
        )
    return TrainingTask(
        make_model=lambda rngs: LanguageModel(config, rngs=rngs),
        model_config=to_mapping(config),
        memory_choices=tuple(f"transformer.{name}" for name in MEMORY_CHOICES),
        loss_function=make_language_loss(parallel, chunks=loss.chunks, z_loss=loss.z_loss),
        rows=rows,
        batch_size=batch_size,
        parallel=parallel,
        tokens=batch_size * length,
        model_flops=lambda parameters: model_flops(config, parameters, batch_size=batch_size, length=length),
        extra=extra,
    )
