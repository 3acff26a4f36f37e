"""Documents in records with named fields, as JSON lines and Parquet tables hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ring_rl.lm.documents.document import CodeSpan, Document, Span, TextSpan

__all__ = ["document_of_spans", "document_of_text", "record_of_spans"]


def document_of_text(
    record: Mapping[str, Any], *, place: str, name: str, text_field: str, prompt_field: str | None
) -> Document:
    """A record's text as a document; what stands in `prompt_field` comes first and carries no loss.

    Raises:
        ValueError: a field is missing or no text; the message begins with `place`.
    """
    spans = [TextSpan(_text(record, text_field, place), weighted=True)]
    if prompt_field is not None:
        spans.insert(0, TextSpan(_text(record, prompt_field, place), weighted=False))
    return Document(name, tuple(spans))


def document_of_spans(record: Mapping[str, Any], *, place: str, name: str, spans_field: str) -> Document:
    """A record's list of spans: `{"text": ..., "weighted": ...}` or `{"modality": ..., "frames": [[...], ...], ...}`.

    `weighted` may be left out and is then true.

    Raises:
        ValueError: the field is missing, or an entry is neither; the message begins with `place`.
    """
    entries = _field(record, spans_field, place)
    if not isinstance(entries, list):
        raise ValueError(f"{place}: field {spans_field!r} must be a list of spans, got {type(entries).__name__}")
    return Document(name, tuple(_span(entry, f"{place}: {spans_field}[{i}]") for i, entry in enumerate(entries)))


def record_of_spans(document: Document, *, spans_field: str) -> dict[str, Any]:
    """The record that `document_of_spans` reads as this document, as plain JSON."""
    entries = []
    for span in document.spans:
        if isinstance(span, TextSpan):
            entries.append({"text": span.text, "weighted": span.weighted})
        else:
            frames = [frame.tolist() for frame in span.frames]
            entries.append({"modality": span.modality, "frames": frames, "weighted": span.weighted})
    return {spans_field: entries}


def _span(entry: Any, place: str) -> Span:
    kinds = ({"text"}, {"modality", "frames"})
    given = set(entry) - {"weighted"} if isinstance(entry, Mapping) else set()
    if given not in kinds:
        raise ValueError(
            f"{place} needs the key text, or modality and frames, and may have weighted; got {entry!r:.80}"
        )
    weighted = entry.get("weighted", True)
    if not isinstance(weighted, bool):
        raise ValueError(f"{place}: weighted must be true or false, got {weighted!r}")
    if given == {"text"}:
        return TextSpan(_text(entry, "text", place), weighted)
    frames = entry["frames"]
    if not isinstance(frames, list) or not all(isinstance(frame, list) and frame for frame in frames):
        raise ValueError(f"{place}: frames must be a list of lists of codes, none of them empty; got {frames!r:.80}")
    if not all(type(code) is int for frame in frames for code in frame):
        raise ValueError(f"{place}: codes must be whole numbers")
    return CodeSpan(str(entry["modality"]), tuple(np.array(frame, np.int32) for frame in frames), weighted)


def _text(record: Mapping[str, Any], field: str, place: str) -> str:
    value = _field(record, field, place)
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {field!r} must be text, got {type(value).__name__}")
    return value


def _field(record: Mapping[str, Any], field: str, place: str) -> Any:
    if field not in record:
        there = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(f"{place}: no field {field!r}; the fields there are {there}: name one in documents.source")
    return record[field]
