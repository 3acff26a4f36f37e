"""Numbers that a paper gives, to stand beside ours."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch

__all__ = ["PublishedTable"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A published table of returns.

    Attributes:
        source: Which paper and table.
        differs: What stands between its numbers and ours, a sentence each.
        returns: task -> column -> return, null where the paper says "oom". A task may be a pattern, as "jaco_reach_*",
            where the paper does not tell several apart.
    """

    source: str
    differs: tuple[str, ...]
    returns: dict[str, dict[str, float | None]]

    def of(self, task: str, column: str | None) -> float | None:
        """The number for a task; None where there is none.

        Raises:
            ValueError: no such column.
        """
        row = next((row for name, row in self.returns.items() if fnmatch.fnmatchcase(task, name)), None)
        if row is None or column is None:
            return None
        if column not in row:
            nearest = difflib.get_close_matches(column, row, n=1)
            guess = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"{self.source} has no column {column!r}; {guess}it has {', '.join(row)}")
        return row[column]

    def text(self, task: str, column: str | None) -> str:
        """The number for a table; empty where there is none."""
        number = self.of(task, column)
        return "" if number is None else f"{number:.2f}"
