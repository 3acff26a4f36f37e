"""Long documents that every machine with Python has: the modules of its standard library, joined by package."""

from __future__ import annotations

import dataclasses
import sysconfig
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import Literal

from ring_rl.lm.documents.document import Document, TextSpan, digest
from ring_rl.lm.documents.files import fingerprint_of_files

__all__ = ["PythonSources", "PythonSourcesConfig"]

# Of other packages than Python's own, wherever they were installed.
_NOT_PYTHONS_OWN = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonSourcesConfig:
    """The sources below a folder, a document for each package or lone module at its top.

    Attributes:
        name: "python_sources".
        root: the folder; null is the standard library of the Python that runs.
        exclude: names of packages and modules to leave out.
        minimum_bytes: documents whose files are smaller together are left out.
    """

    name: Literal["python_sources"]
    root: Path | None
    exclude: tuple[str, ...]
    minimum_bytes: int


class PythonSources:
    """A `DocumentSource` over Python modules.

    A package's modules follow one another in the order of their paths, each below a comment with its path, so that a
    document of some 100,000 tokens is about one thing, and names in one module come back in another. Files that do
    not decode in the encoding they declare (the standard library's tests have some on purpose) are passed over.

    Raises:
        FileNotFoundError: the folder is not there, or nothing in it is that large.
    """

    def __init__(self, config: PythonSourcesConfig):
        self._root = Path(sysconfig.get_paths()["stdlib"]) if config.root is None else config.root
        self._own = config.root is not None
        if not self._root.is_dir():
            raise FileNotFoundError(f"documents.source.root={self._root} is not there; name a folder with Python files")
        files: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for path in self._root.rglob("*.py"):
            below = path.relative_to(self._root)
            top = below.parts[0].removesuffix(".py")
            if top not in config.exclude and not _NOT_PYTHONS_OWN.intersection(below.parts):
                files[top].append((below.as_posix(), path))
        sizes = {top: sum(path.stat().st_size for _, path in paths) for top, paths in files.items()}
        self._names = sorted(top for top, size in sizes.items() if size >= config.minimum_bytes)
        self._files = {top: sorted(files[top]) for top in self._names}
        if not self._names:
            raise FileNotFoundError(
                f"{self._root} holds no Python package of {config.minimum_bytes} bytes or more; name another folder "
                "or lower documents.source.minimum_bytes"
            )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The package's or the module's."""
        return self._names[index]

    def document(self, index: int) -> Document:
        """The package's modules, joined."""
        name = self._names[index]
        modules = ((below, _source(path)) for below, path in self._files[name])
        text = "\n".join(f"# {below}\n{source}" for below, source in modules if source is not None)
        return Document(name, (TextSpan(text, weighted=True),))

    @property
    def fingerprint(self) -> str:
        """Of names and sizes: the same for the same version of Python wherever it is installed.

        Of one's own folder, which may be worked on, of times of change, too.
        """
        files = [each for name in self._names for each in self._files[name]]
        if self._own:
            return fingerprint_of_files([path for _, path in files], self._root)
        return digest(*(f"{below} {path.stat().st_size}" for below, path in files))


def _source(path: Path) -> str | None:
    """The file's text, or None where it does not decode."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None
