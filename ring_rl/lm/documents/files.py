"""The files of a corpus: found by pattern, in an order that no machine changes, and recognised again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ring_rl.lm.documents.document import digest

__all__ = ["find_files", "fingerprint_of_files", "name_of"]


def find_files(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The files under `root` that match any of the patterns, ordered by their path below it.

    Args:
        root: a folder, or one file, which is then the only one whatever the patterns are.
        patterns: as `Path.glob` takes them; `**/*.txt` looks into subfolders too.

    Raises:
        FileNotFoundError: there is no `root`, or nothing in it matches.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"documents.source.root={root} is not there; name a folder or a file")
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"documents.source.root={root} holds no file like {', '.join(patterns)}; "
            "name another folder or set documents.source.patterns"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def name_of(path: Path, root: Path) -> str:
    """The path below `root`, with slashes."""
    return path.name if path == root else path.relative_to(root).as_posix()


def fingerprint_of_files(paths: Sequence[Path], root: Path, *options: str) -> str:
    """Of names, sizes and times of change, and of the options they are read with; contents are not read."""
    stats = [(name_of(path, root), path.stat()) for path in paths]
    return digest(*(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats), *options)
