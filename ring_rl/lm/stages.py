"""Stages of training a language model: from short sequences to long ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ring_rl.config import to_mapping
from ring_rl.kernels.layout import padded_length
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.lm.training_data import TrainingData
from ring_rl.lm.training_task import LossConfig, make_language_task
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.milestone import AdvanceWhen
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.stage import TrainingStage

__all__ = ["StageConfig", "StageSchedule", "make_stages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSchedule:
    """A stage's own learning rate; see `ScheduledOptimizer`."""

    learning_rate: float
    warmup_steps: int
    schedule: Literal["constant", "cosine", "linear"]
    final_learning_rate_fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage.

    Attributes:
        length: Tokens of a row; null: as many as `lines` need.
        lines: Lines of a record, for data that hold such; null: as many as `length` has room for. Exactly one of the
            two is given.
        short_share: Share of the rows that hold shorter records than the stage's; for data that hold records.
        batch_size: Rows of a batch, over all devices.
        accumulation_steps: Microbatches that a batch is cut into.
        rotary_base: Of the rotary frequencies, from this stage on; null leaves it.
        steps: Optimizer steps, at most.
        minimum_steps: At least, where `advance_when` ends the stage.
        advance_when: Ends the stage before its last step; null trains all of them.
        schedule: The stage's learning rate, over its `steps`; null takes the run's optimizer as it is.
        keep_moments: Whether the optimizer's moments go on from the stage before.
    """

    length: int | None
    lines: int | None
    short_share: float
    batch_size: int
    accumulation_steps: int
    rotary_base: float | None
    steps: int
    minimum_steps: int
    advance_when: AdvanceWhen | None
    schedule: StageSchedule | None
    keep_moments: bool

    def __post_init__(self) -> None:
        if (self.length is None) == (self.lines is None):
            raise ValueError(
                f"a stage needs either length or lines, got length={self.length} lines={self.lines}; "
                f"set the other one to null"
            )
        for name in ("length", "lines", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.short_share <= 1:
            raise ValueError(f"short_share must lie in [0, 1], got {self.short_share}")

    def optimizer(self, optimizer: OptimizerConfig) -> OptimizerConfig:
        """The run's optimizer with the stage's own schedule."""
        return optimizer if self.schedule is None else dataclasses.replace(optimizer, **vars(self.schedule))


def make_stages(
    stages: Mapping[str, StageConfig],
    model: LanguageModelConfig,
    data: TrainingData,
    tokenizer: Tokenizer,
    *,
    optimizer: OptimizerConfig,
    loss: LossConfig,
    parallel: SequenceParallel,
    seed: int,
    extra: Mapping[str, Any],
) -> list[TrainingStage]:
    """Stages that `run_stages` trains, in their order.

    The rotary base of a stage holds for those after it too. A stage's model says that it was trained on as many
    positions as the longest rows up to then have.

    Raises:
        ValueError: the mesh, the data or the model do not allow a stage; the message names it.
    """
    made, tokenizer_mapping = [], tokenizer.to_mapping()
    for index, (name, stage) in enumerate(stages.items()):
        try:
            needed = data.row_length(length=stage.length, lines=stage.lines)
            length = padded_length(needed, ring_size=parallel.ring_size, layout=parallel.layout)
            if stage.length is not None and length != needed:
                raise ValueError(
                    f"length={needed} is not divisible by the ring of {parallel.ring_size} in the {parallel.layout} "
                    f"layout; use {length}"
                )
            if stage.rotary_base is not None:
                transformer = dataclasses.replace(model.transformer, rotary_base=stage.rotary_base)
                model = dataclasses.replace(model, transformer=transformer)
            model = dataclasses.replace(model, trained_positions=max(model.trained_positions, length))
            rows = data.rows(length=length, lines=stage.lines, short_share=stage.short_share, seed=(seed, index))
            task = make_language_task(
                model,
                rows,
                length=length,
                batch_size=stage.batch_size,
                loss=loss,
                parallel=parallel,
                extra={
                    **extra,
                    "tokenizer": tokenizer_mapping,
                    "stages": {earlier: to_mapping(stages[earlier]) for earlier in list(stages)[: index + 1]},
                },
            )
            made.append(
                TrainingStage(
                    name=name,
                    task=task,
                    steps=stage.steps,
                    minimum_steps=stage.minimum_steps,
                    advance_when=stage.advance_when,
                    optimizer=stage.optimizer(optimizer),
                    accumulation_steps=stage.accumulation_steps,
                    keep_moments=stage.keep_moments,
                )
            )
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from error
    return made
