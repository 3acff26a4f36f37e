"""What a run's folder says of its finished stages."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ring_rl.atomic_file import write_whole
from ring_rl.config import from_mapping, to_mapping

__all__ = ["StageRecord", "read_stage_records", "record_of_stage", "whole_seconds", "write_stage_record"]

_STAGES = "stages.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What `stages.json` says of a finished stage.

    Attributes:
        name: the stage's.
        first_step: steps of the run that were taken before it.
        last_step: steps that were taken after it.
        tokens: that it read, padding included.
        advanced: whether `advance_when` ended it, and not its last step.
        compile_seconds: of its step.
        train_seconds: from its first step to its checkpoint.
        resumed: whether an earlier process began it; the seconds are then those of the last one.
    """

    name: str
    first_step: int
    last_step: int
    tokens: int
    advanced: bool
    compile_seconds: float
    train_seconds: float
    resumed: bool


def read_stage_records(run_dir: pathlib.Path) -> dict[str, StageRecord]:
    """What a run says of its finished stages, by name; none where it says nothing yet.

    Raises:
        ValueError: the file is damaged.
    """
    file = run_dir / _STAGES
    try:
        known = json.loads(file.read_text()) if file.exists() else {}
        return {name: from_mapping(StageRecord, facts, path=name) for name, facts in known.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); repair it, or train again in another folder") from None


def record_of_stage(file: pathlib.Path, stage: str, facts: Mapping[str, Any]) -> None:
    """One more entry of a JSON file, or the same one anew, by the stage's name."""
    known = json.loads(file.read_text()) if file.exists() else {}
    write_whole(file, json.dumps(known | {stage: facts}, indent=2) + "\n")


def write_stage_record(run_dir: pathlib.Path, record: StageRecord) -> None:
    """One more finished stage, or the same one anew, beside those that are there."""
    record_of_stage(run_dir / _STAGES, record.name, to_mapping(record))


def whole_seconds(records: Iterable[StageRecord]) -> float | None:
    """Of stages together, compilation included; None where one was resumed, whose first part no one timed."""
    records = list(records)
    if any(record.resumed for record in records):
        return None
    return sum(record.compile_seconds + record.train_seconds for record in records)
