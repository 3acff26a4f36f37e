"""Where metrics go: a JSONL file, the console, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import rich
from rich.console import Console

from ring_rl.atomic_file import write_whole
from ring_rl.training.interrupt import TrainingInterrupted

__all__ = [
    "PERFORMANCE_PREFIX",
    "ConsoleWriter",
    "JsonlWriter",
    "MetricsWriter",
    "WandbConfig",
    "WandbWriter",
    "read_metrics",
    "without_performance",
]

# Begins the names of all figures about the machine: times, rates, memory. All others are reproducible to the bit.
PERFORMANCE_PREFIX = "performance/"


class MetricsWriter(Protocol):
    """Receives the metrics of a step, each step once and in ascending order."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics after `step` optimizer steps."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """Flush and release; `error` is what ended the training early."""
        ...


class JsonlWriter:
    """Appends `{"step": s, name: value, ...}`, one object a line, each at once.

    A resumed run writes the steps after its checkpoint again. What stands in the file beyond that step, and a
    last line that a killed process left torn, is moved to `<name>.superseded.jsonl` first, so that no step
    stands twice. Values that JSON cannot hold (NaN, infinities) are written as null.

    Args:
        path: the file; created when missing.
        resume_step: the step that training goes on from; 0 at a start.
    """

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        self._path = pathlib.Path(path)
        if self._path.exists():
            self._supersede(resume_step)
        # Unbuffered: a line is with the system once `write` returns, and a full disk is met there.
        self._file = self._path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        record = {"step": step} | {name: _finite_or_none(value) for name, value in metrics.items()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            # A disk with room for a part of the line takes that part and does not complain; the rest does.
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, f"metrics cannot be written: {error.strerror}", str(self._path)) from error

    def close(self, error: BaseException | None = None) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _supersede(self, resume_step: int) -> None:
        records = _parse(self._path)
        kept = [line for line, record in records if record is not None and record["step"] <= resume_step]
        beyond = [line for line, record in records if record is None or record["step"] > resume_step]
        if not beyond:
            return
        aside = self._path.with_name(f"{self._path.stem}.superseded.jsonl")
        with aside.open("a") as file:
            file.writelines(f"{line}\n" for line in beyond)
            file.flush()
            os.fsync(file.fileno())
        write_whole(self._path, "".join(f"{line}\n" for line in kept))


class ConsoleWriter:
    """One line a step, above the progress bar when one is shown on the same console."""

    def __init__(self, console: Console | None = None):
        self._console = console or rich.get_console()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the step and its metrics."""
        values = "  ".join(f"{name.removeprefix(PERFORMANCE_PREFIX)} {value:.5g}" for name, value in metrics.items())
        self._console.print(f"step {step:>7}  {values}", highlight=False, markup=False, soft_wrap=True)

    def close(self, error: BaseException | None = None) -> None:
        """Nothing to release."""


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases.

    Attributes:
        mode: "offline" writes into the run folder, for `wandb sync` later; "disabled" does nothing at all.
        project: the project's name.
        entity: the team or user; null takes the account's default.
        name: the run's display name; null lets wandb make one up.
    """

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    name: str | None

    def __post_init__(self) -> None:
        if self.mode != "disabled" and not self.project:
            raise ValueError("wandb needs a project name, got ''; give one or set mode to disabled")


class WandbWriter:
    """Sends metrics to one wandb run, the same one after every resume; prints nothing.

    The run's id is kept in `<folder>/wandb_run_id` and its files in `<folder>/wandb/`. wandb is imported only
    when the mode is not "disabled".

    Args:
        config: mode and names.
        folder: the run's folder.
        run_config: the resolved configuration, shown beside the run.

    Raises:
        ValueError: wandb refuses to start (not logged in, no such entity, no network).
    """

    def __init__(self, config: WandbConfig, *, folder: pathlib.Path, run_config: Mapping[str, Any]):
        self._run: Any = None
        if config.mode == "disabled":
            return
        import wandb

        try:
            self._run = wandb.init(
                mode=config.mode,
                project=config.project,
                entity=config.entity,
                name=config.name,
                id=_run_id(folder),
                dir=folder,
                config=dict(run_config),
                # An offline run cannot ask the server and would warn; the same id joins it on syncing.
                resume="allow" if config.mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"wandb cannot start ({reason}); run `wandb login`, or set its mode to offline or disabled"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at this step."""
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def close(self, error: BaseException | None = None) -> None:
        """Finish the run's upload or file: as finished; as preempted, which a sweep hands out again; or as failed."""
        if self._run is None:
            return
        if isinstance(error, TrainingInterrupted):
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if error is None else 1)
        self._run = None


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; a torn last line, which a killed process leaves, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is no record.
    """
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"no metrics file {path}; train first, or name the file of a run")
    return [record for _, record in _parse(pathlib.Path(path)) if record is not None]


def without_performance(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the figures about the machine: what two runs of one configuration have in common."""
    return {name: value for name, value in record.items() if not name.startswith(PERFORMANCE_PREFIX)}


def _parse(path: pathlib.Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Each line and its record, which is None for a torn last line."""
    # A line torn inside a character is no valid UTF-8 either.
    lines = path.read_text(errors="replace").split("\n")
    complete, tail = lines[:-1], lines[-1]
    parsed: list[tuple[str, dict[str, Any] | None]] = []
    for number, line in enumerate(complete, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            raise ValueError(f"line {number} of {path} is no metrics record: {line[:60]!r}; repair or remove it")
        parsed.append((line, record))
    if tail:
        # Without its newline even a line that parses may have lost digits of its last number.
        parsed.append((tail, None))
    return parsed


def _finite_or_none(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _run_id(folder: pathlib.Path) -> str:
    file = pathlib.Path(folder) / "wandb_run_id"
    if not file.exists():
        write_whole(file, secrets.token_hex(4) + "\n")
    return file.read_text().strip()
