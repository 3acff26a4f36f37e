"""Files that are either there in full or not there at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["atomic_file", "refuse_existing", "write_whole"]


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary path in `path`'s folder; on success its content appears as `path` in one step.

    A crash or an exception inside the block leaves `path` as it was and removes the temporary file. The
    temporary name starts with a dot and keeps the suffix, for writers that look at it.

    Args:
        path: Where the file shall appear. Its folder must exist.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, even if it appeared during the block.
    """
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; move it away or choose another name")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a data set is to be shared.
        temporary.chmod(0o666 & ~_umask())
        if overwrite:
            os.replace(temporary, path)
        else:
            _move_without_overwriting(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is found whole or as it was before, whenever the process dies."""
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def refuse_existing(folder: Path, names: Sequence[str]) -> None:
    """Raises FileExistsError if any of these files is in the folder: before work starts, not when it is written."""
    taken = [name for name in names if (folder / name).exists()]
    if taken:
        raise FileExistsError(f"{folder} holds {', '.join(taken)} already; choose another output or set overwrite=true")


def _move_without_overwriting(temporary: Path, path: Path) -> None:
    """A hard link is the one portable way to create a name in one step and fail if it is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists and is not overwritten; move it away or choose another name") from None
    except OSError:  # a file system without hard links: a check and a rename, with a race of microseconds
        if path.exists():
            raise FileExistsError(
                f"{path} exists and is not overwritten; move it away or choose another name"
            ) from None
        os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
