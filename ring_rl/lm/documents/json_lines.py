"""JSON lines: one line, one document."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from ring_rl.lm.documents.document import Document
from ring_rl.lm.documents.files import find_files, fingerprint_of_files, name_of
from ring_rl.lm.documents.records import document_of_spans, document_of_text
from ring_rl.typing import Int

__all__ = ["JsonLines", "JsonLinesConfig"]

_BLOCK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLinesConfig:
    """Files of JSON objects, one a line; lines of white space are passed over.

    Attributes:
        name: "json_lines".
        root: the folder, or one file.
        patterns: of the files' names, as `Path.glob` takes them.
        text_field: holds the text; null where `spans_field` says it.
        prompt_field: holds text that comes first and carries no loss; null is none.
        spans_field: holds a list of spans of text and of codes (`ring_rl.lm.documents.records`); null is none.
    """

    name: Literal["json_lines"]
    root: Path
    patterns: tuple[str, ...]
    text_field: str | None
    prompt_field: str | None
    spans_field: str | None

    def __post_init__(self) -> None:
        if (self.text_field is None) == (self.spans_field is None):
            raise ValueError(
                f"set one of text_field and spans_field and the other to null, got text_field={self.text_field} "
                f"spans_field={self.spans_field}"
            )
        if self.spans_field is not None and self.prompt_field is not None:
            raise ValueError("prompt_field goes with text_field; a span says itself whether it is weighted")


class JsonLines:
    """A `DocumentSource` over files of JSON lines.

    Files are read through once, to know where lines begin: 8 bytes of memory a document.

    Raises:
        FileNotFoundError: nothing there matches.
    """

    def __init__(self, config: JsonLinesConfig):
        self._config = config
        self._paths = find_files(config.root, config.patterns)
        self._begins = [_line_begins(path) for path in self._paths]
        self._first = np.cumsum([0, *(len(begins) for begins in self._begins)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def name(self, index: int) -> str:
        """The file's path below the folder, and the number of the document in it, from 1."""
        file, number = self._locate(index)
        return f"{name_of(self._paths[file], self._config.root)}:{number + 1}"

    def document(self, index: int) -> Document:
        """What the line holds."""
        file, number = self._locate(index)
        begin = int(self._begins[file][number])
        with self._paths[file].open("rb") as lines:
            lines.seek(begin)
            line = lines.readline()
        place = f"{self._paths[file]}, document {number + 1} (byte {begin})"
        try:
            record = json.loads(line)
        except ValueError as error:  # of the encoding, too
            raise ValueError(f"{place} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place} must be a JSON object, got {type(record).__name__}")
        config, name = self._config, self.name(index)
        if config.spans_field is not None:
            return document_of_spans(record, place=place, name=name, spans_field=config.spans_field)
        assert config.text_field is not None
        return document_of_text(
            record, place=place, name=name, text_field=config.text_field, prompt_field=config.prompt_field
        )

    @property
    def fingerprint(self) -> str:
        """Of the files and the fields."""
        config = self._config
        fields = (config.text_field, config.prompt_field, config.spans_field)
        return fingerprint_of_files(self._paths, config.root, repr(fields))

    def _locate(self, index: int) -> tuple[int, int]:
        """(file, document in it)."""
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, index - int(self._first[file])


def _line_begins(path: Path) -> Int[np.ndarray, " N"]:
    """The byte at which each line begins that holds more than white space."""
    begins: list[int] = []
    with path.open("rb") as file:
        at = 0
        # readlines gives whole lines, about so many bytes of them at a time.
        while lines := file.readlines(_BLOCK_BYTES):
            for line in lines:
                if not line.isspace():
                    begins.append(at)
                at += len(line)
    return np.array(begins, np.int64)
