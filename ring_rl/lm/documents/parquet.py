"""Parquet tables: one row, one document."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ring_rl.lm.documents.document import Document
from ring_rl.lm.documents.files import find_files, fingerprint_of_files, name_of
from ring_rl.lm.documents.records import document_of_text

__all__ = ["Parquet", "ParquetConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    """Parquet files; of each only the columns named here are read.

    Attributes:
        name: "parquet".
        root: the folder, or one file.
        patterns: of the files' names, as `Path.glob` takes them.
        text_field: the column of text.
        prompt_field: the column of text that comes first and carries no loss; null is none.
    """

    name: Literal["parquet"]
    root: Path
    patterns: tuple[str, ...]
    text_field: str
    prompt_field: str | None

    @property
    def columns(self) -> list[str]:
        """Those that are read."""
        return [self.text_field] if self.prompt_field is None else [self.prompt_field, self.text_field]


class Parquet:
    """A `DocumentSource` over Parquet files. It holds one row group at a time: fastest from front to back.

    Raises:
        FileNotFoundError: nothing there matches.
        ImportError: pyarrow is missing.
        ValueError: a file is no Parquet file, or lacks a column.
    """

    def __init__(self, config: ParquetConfig):
        self._config = config
        self._paths = find_files(config.root, config.patterns)
        # (file, row group in it, row of the file that it begins with), and the documents before each.
        self._groups: list[tuple[int, int, int]] = []
        self._first = [0]
        for file, path in enumerate(self._paths):
            metadata = _opened(path, config.columns).metadata
            begin = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group, begin))
                begin += metadata.row_group(group).num_rows
                self._first.append(self._first[-1] + metadata.row_group(group).num_rows)
        self._held: tuple[int, dict[str, list[Any]]] | None = None

    def __len__(self) -> int:
        return self._first[-1]

    def name(self, index: int) -> str:
        """The file's path below the folder, and the row in it, from 1."""
        group, row = self._locate(index)
        file, _, begin = self._groups[group]
        return f"{name_of(self._paths[file], self._config.root)}:{begin + row + 1}"

    def document(self, index: int) -> Document:
        """What the row holds."""
        group, row = self._locate(index)
        file, number, begin = self._groups[group]
        held = self._held
        if held is None or held[0] != group:
            table = _opened(self._paths[file], self._config.columns).read_row_group(
                number, columns=self._config.columns
            )
            held = self._held = (group, table.to_pydict())
        return document_of_text(
            {field: column[row] for field, column in held[1].items()},
            place=f"{self._paths[file]}, row {begin + row + 1}",
            name=self.name(index),
            text_field=self._config.text_field,
            prompt_field=self._config.prompt_field,
        )

    @property
    def fingerprint(self) -> str:
        """Of the files and the columns."""
        return fingerprint_of_files(self._paths, self._config.root, repr(self._config.columns))

    def _locate(self, index: int) -> tuple[int, int]:
        """(row group among all, row in it)."""
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        return group, index - self._first[group]


def _opened(path: Path, columns: list[str]) -> Any:
    """The file, checked for its columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet files need pyarrow; pip install 'ring_rl[lm]'") from None
    try:
        opened = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None
    there = opened.schema_arrow.names
    if missing := [column for column in columns if column not in there]:
        raise ValueError(
            f"{path}: no column {missing[0]!r}; the columns there are {', '.join(there)}: name one in documents.source"
        )
    return opened
