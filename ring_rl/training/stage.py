"""A stage of a training run in stages, and what a checkpoint and a metrics file say of it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ring_rl.training.checkpoint_format import FORMAT_VERSION, read_metadata
from ring_rl.training.metrics import MetricsWriter
from ring_rl.training.milestone import AdvanceWhen, Milestone
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.task import RunStream, TrainingTask
from ring_rl.typing import PyTree

__all__ = ["StagePlace", "StageStream", "StageWriter", "TrainingStage", "place_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """One stage.

    Attributes:
        name: its own among those of the run.
        task: what is trained. The stages' models may differ in what is no parameter only.
        steps: at most.
        minimum_steps: at least, where `advance_when` ends it.
        advance_when: ends it before its last step; None trains all of them.
        optimizer: rule and schedule, which spans the stage's `steps`.
        accumulation_steps: microbatches of a batch.
        keep_moments: whether the optimizer's state goes on from the stage before; otherwise it begins anew.
    """

    name: str
    task: TrainingTask
    steps: int
    minimum_steps: int
    advance_when: AdvanceWhen | None
    optimizer: OptimizerConfig
    accumulation_steps: int
    keep_moments: bool

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"stage {self.name}: steps must be at least 1, got {self.steps}")
        if not 0 <= self.minimum_steps <= self.steps:
            raise ValueError(
                f"stage {self.name}: minimum_steps must lie in [0, {self.steps}], its steps, got {self.minimum_steps}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlace:
    """Where a run stands; checkpoints carry it.

    Attributes:
        stage: its index.
        first_step: steps of the run that were taken before the stage.
        moments_since: steps that were taken before the optimizer's state last began anew.
    """

    stage: int
    first_step: int
    moments_since: int


def place_of(checkpoint: pathlib.Path, stages: Sequence[TrainingStage]) -> tuple[StagePlace, Sequence[float]]:
    """Where a checkpoint says that its run stands, and what its milestone had observed.

    Raises:
        ValueError: it is not one of a run in so many stages, or cannot be read.
    """
    saved = dict((read_metadata(checkpoint, formats=(FORMAT_VERSION,)).input_state or {}).get("stage") or {})
    observed = saved.pop("observed", ())
    try:
        place = StagePlace(**saved)
    except TypeError:
        raise ValueError(
            f"the checkpoint {checkpoint} was not written by a run in stages; choose another run_dir"
        ) from None
    if not 0 <= place.stage < len(stages):
        raise ValueError(f"the checkpoint {checkpoint} is of stage {place.stage}, but there are {len(stages)} stages")
    return place, observed


class StageStream:
    """A stage's batches, whose state says which stage it is and what its milestone has observed."""

    def __init__(self, stream: RunStream, place: StagePlace, milestone: Milestone):
        self._stream, self._place, self._milestone = stream, place, milestone

    @property
    def abstract_batch(self) -> PyTree[jax.ShapeDtypeStruct]:
        """See `RunStream`."""
        return self._stream.abstract_batch

    def start(self) -> None:
        """See `RunStream`."""
        self._stream.start()

    def __next__(self) -> PyTree[jax.Array]:
        return next(self._stream)

    def state(self) -> dict[str, Any]:
        """That of the stream below, and `stage`."""
        return {
            **self._stream.state(),
            "stage": {**dataclasses.asdict(self._place), "observed": self._milestone.observed},
        }

    def batch_at(self, step: int) -> PyTree[Any]:
        """See `BatchStream`."""
        return self._stream.batch_at(step)

    def close(self) -> None:
        """See `BatchStream`."""
        self._stream.close()


class StageWriter:
    """Writes the stage's number beside its metrics."""

    def __init__(self, writer: MetricsWriter, stage: int):
        self._writer, self._stage = writer, stage

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `MetricsWriter`."""
        self._writer.write(step, {**metrics, "stage": float(self._stage)})

    def close(self, error: BaseException | None = None) -> None:
        """See `MetricsWriter`."""
        self._writer.close(error)
