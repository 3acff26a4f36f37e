"""A run's folder: its configuration, metrics, checkpoints and plots, and a lock for one process at a time.

<run>/config.yaml     the resolved configuration; the same one resumes, another one is refused
<run>/metrics.jsonl   one object a line
<run>/checkpoints/    as `ring_rl.training.checkpoint` writes them
<run>/plots/
<run>/run.lock        held while a process has the run open

Where several processes train together, the main one makes and locks the folder; it must lie where all of them see it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Mapping
from typing import IO, Any

import yaml

from ring_rl.atomic_file import write_whole
from ring_rl.config import describe_differences
from ring_rl.training.distributed import on_main_process

__all__ = ["RunDirectory", "open_run_directory"]

_LOCK = "run.lock"
_CONFIG = "config.yaml"


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """An open run; a context manager that gives its lock back.

    Attributes:
        path: the folder.
        resumed: True when the folder held this run already.
    """

    path: pathlib.Path
    resumed: bool
    _lock: IO[str] | None

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> pathlib.Path:
        """The checkpoint folder."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> pathlib.Path:
        """The folder for plots."""
        return self.path / "plots"

    def close(self) -> None:
        """Give the lock back; another process may open the run."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run_directory(
    path: pathlib.Path, resolved_config: Mapping[str, Any], *, may_differ: tuple[str, ...] = ()
) -> RunDirectory:
    """Create a run's folder, or open it again to resume.

    Args:
        path: missing, empty, or a run of the same configuration.
        resolved_config: plain nested mapping, stored as YAML.
        may_differ: dotted paths that say nothing about the result (where the run lies, how it reports) and
            may change on resuming; the file keeps the values that the run began with.

    Raises:
        ValueError: the folder holds something else, or a run of another configuration (the differing keys are
            listed), or another process has it open; or it was made where this process does not see it.
    """
    path = pathlib.Path(path).absolute()
    lock: IO[str] | None = None

    def open_here() -> bool:
        nonlocal lock
        lock, resumed = _open_and_lock(path, resolved_config, may_differ)
        return resumed

    # The others hear of an error too, instead of waiting for a process that is gone.
    resumed = on_main_process("open run directory", open_here)
    if not path.is_dir():
        raise ValueError(
            f"the run folder {path} is not seen by every process; choose a run_dir on a shared file system"
        )
    return RunDirectory(path, resumed, lock)


def _open_and_lock(
    path: pathlib.Path, resolved_config: Mapping[str, Any], may_differ: tuple[str, ...]
) -> tuple[IO[str], bool]:
    """The held lock, and whether the folder held this run already."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"the run folder {path} is a file; choose another run_dir")
    if path.is_dir() and not (path / _CONFIG).exists() and (strange := _strangers(path)):
        raise ValueError(
            f"{path} is not empty and holds no run (it has {', '.join(strange[:3])}"
            f"{', ...' if len(strange) > 3 else ''}, but no {_CONFIG}); choose another run_dir"
        )
    path.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(path)
    try:
        resumed = (path / _CONFIG).exists()
        if resumed:
            _require_same_config(path / _CONFIG, resolved_config, may_differ)
        else:
            write_whole(path / _CONFIG, yaml.safe_dump(dict(resolved_config), sort_keys=False))
        run = RunDirectory(path, resumed, lock)
        run.metrics.touch()
        run.checkpoints.mkdir(exist_ok=True)
        run.plots.mkdir(exist_ok=True)
        return lock, resumed
    except BaseException:
        lock.close()
        raise


def _strangers(path: pathlib.Path) -> list[str]:
    """What lies in a folder that neither a run cut off at its birth nor Hydra's own log would leave."""
    half_written = f".{pathlib.Path(_CONFIG).stem}."

    def belongs(name: str) -> bool:
        return name in (_LOCK, ".hydra") or name.startswith(half_written) or name.endswith(".log")

    return sorted(entry.name for entry in path.iterdir() if not belongs(entry.name))


def _take_lock(path: pathlib.Path) -> IO[str]:
    # "a+" creates the file without emptying the one that its present holder wrote its number into.
    lock = (path / _LOCK).open("a+")
    try:
        # The system gives a flock back when its holder dies, however it dies.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise ValueError(
            f"another process (pid {holder}) has the run {path} open; wait for it, or choose another run_dir"
        ) from None
    except BaseException:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _require_same_config(file: pathlib.Path, wanted: Mapping[str, Any], may_differ: tuple[str, ...]) -> None:
    try:
        saved = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML ({str(error).splitlines()[0]}); choose another run_dir") from None
    if not isinstance(saved, Mapping):
        raise ValueError(f"{file} holds no configuration; choose another run_dir")
    differences = describe_differences(saved, wanted, ignore=may_differ)
    if differences:
        raise ValueError(
            f"{file.parent} holds a run of another configuration ({'; '.join(differences)}); "
            f"choose another run_dir, or give the saved values to resume it"
        )
