"""What is derived from a data set and kept beside it: how its source is recognised, and who may write it.

Derived files (`store/`, `relabelled/`) can always be made again from `buffer/`, so they are replaced without
asking. They must never be taken for those of another source, and two processes must not make them at once.
"""

from __future__ import annotations

import errno
import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ring_rl.typing import Shaped

__all__ = ["exclusive", "progress_bar", "signature", "signatures"]


def signature(path: Path) -> int:
    """A fingerprint of an episode's content in 64 bits; it survives copying and renaming.

    Made of the names, sizes and CRC-32 sums in the archive's directory, so the arrays are not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((each.filename, each.file_size, each.CRC) for each in archive.infolist())
    except (zipfile.BadZipFile, EOFError, UnicodeDecodeError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: truncated or corrupt npz file ({error}); remove it and fetch or collect it again"
        ) from None
    return int.from_bytes(hashlib.blake2b(repr(members).encode(), digest_size=8).digest(), "little")


def signatures(paths: Sequence[Path]) -> Shaped[np.ndarray, " E"]:
    """The `signature` of each. Cost: 0.1 ms a file where the disk is not waited for."""
    return np.array([signature(path) for path in paths], dtype=np.uint64)


@contextmanager
def exclusive(folder: Path, name: str, *, remedy: str) -> Iterator[None]:
    """Waits until no other process derives `name` from this data set; a process that dies gives the lock back.

    Args:
        folder: The data set's.
        name: Of what is derived.
        remedy: What to do, besides making the folder writable, where it is not.

    Raises:
        OSError: the folder cannot be written.
    """
    import fcntl  # not everywhere, and needed only where something is written

    path = folder / f".{name}.lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise OSError(
            error.errno,
            f"{name} cannot be written beside the data in {folder} ({error.strerror}); make the folder writable, "
            f"or {remedy}",
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            Console(stderr=True).print(f"waiting for another process that makes {name} in {folder}", highlight=False)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def progress_bar(*, shown: bool) -> Progress:
    """A bar of episodes with the time left, on a terminal only."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    )
