"""A folder of text files: one file, one document."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from ring_rl.lm.documents.document import Document, TextSpan
from ring_rl.lm.documents.files import find_files, fingerprint_of_files, name_of

__all__ = ["TextFolder", "TextFolderConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolderConfig:
    """A folder of text files.

    Attributes:
        name: "text_folder".
        root: the folder, or one file.
        patterns: of the files' names, as `Path.glob` takes them.
    """

    name: Literal["text_folder"]
    root: Path
    patterns: tuple[str, ...]


class TextFolder:
    """A `DocumentSource` over UTF-8 text files.

    Raises:
        FileNotFoundError: nothing there matches.
    """

    def __init__(self, config: TextFolderConfig):
        self._root = config.root
        self._paths = find_files(config.root, config.patterns)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The file's path below the folder."""
        return name_of(self._paths[index], self._root)

    def document(self, index: int) -> Document:
        """The file's text as it stands there, line ends included."""
        path = self._paths[index]
        try:
            # Not read_text, which would turn other line ends into "\n".
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {error.start}; convert it, or leave it out of documents.source.patterns"
            ) from None
        return Document(self.name(index), (TextSpan(text, weighted=True),))

    @property
    def fingerprint(self) -> str:
        """Of the files."""
        return fingerprint_of_files(self._paths, self._root)
