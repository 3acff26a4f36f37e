"""Tables as CSV and as Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["csv_table", "markdown_table"]


def csv_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV, under the names of all their keys; what a record lacks, and None, is left empty."""
    if not records:
        return ""
    text = io.StringIO()
    names = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first one its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
