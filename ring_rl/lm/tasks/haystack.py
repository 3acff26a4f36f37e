"""Long texts in which something can be hidden: excerpts of a given number of tokens, cut where sentences end."""

from __future__ import annotations

import bisect
import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["Haystack", "insert_all", "place_after", "place_before", "python_reference", "read_haystack"]

# A sentence or a line ends here; source code has few sentences.
_END = re.compile(r"[.!?](?=\s)|\n")


def python_reference() -> str:
    """Python's language reference, which every CPython brings along: 465,000 characters of English technical prose."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_haystack(path: Path) -> str:
    """A text file, or all `.txt` files of a folder in the order of their names.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no text in it, or it is no UTF-8.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no haystack at {path}")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise ValueError(f"the haystack {path} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"the haystack {path} holds no text" + (" in .txt files" if path.is_dir() else ""))
    return text


class Haystack:
    """A text, and where its tokens begin.

    Args:
        text: Goes round: after its end comes its beginning.
        tokenizer: That counts tokens.

    Raises:
        ValueError: the text is empty.
    """

    def __init__(self, text: str, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._text = text if text[-1:].isspace() else text + "\n"
        if not text.strip():
            raise ValueError("a haystack needs text, this one is empty")
        _, spans = tokenizer.encode_with_spans(self._text)
        self._token_starts = spans[:, 0]
        self._sentence_starts = [0, *(match.end() for match in _END.finditer(self._text.rstrip()))]

    def require_absent(self, phrase: str) -> None:
        """Raises a ValueError if the phrase stands in the text already: then nothing is hidden by hiding it."""
        if phrase in self._text:
            raise ValueError(f"the haystack itself holds {phrase!r}; choose another text")

    def draw_start(self, generator: np.random.Generator) -> int:
        """Where an excerpt begins: any beginning of a sentence, each as likely."""
        return self._sentence_starts[int(generator.integers(len(self._sentence_starts)))]

    def excerpt(self, start: int, tokens: int) -> str:
        """So many tokens of text, from the character `start` on.

        Encoded anew it may differ by a token or two at its ends.
        """
        first = int(np.searchsorted(self._token_starts, start))
        rounds, last = divmod(first + max(tokens, 0), len(self._token_starts))
        end = int(self._token_starts[last])
        if not rounds:
            return self._text[start:end]
        return self._text[start:] + self._text * (rounds - 1) + self._text[:end]


def _sentence_ends(text: str) -> list[int]:
    return [0, *(match.end() for match in _END.finditer(text)), len(text)]


def place_before(text: str, depth: float) -> int:
    """The end of a sentence at or before this share of the text's characters (LWM); the text's own end for 1."""
    ends = _sentence_ends(text)
    return ends[bisect.bisect_right(ends, int(depth * len(text))) - 1]


def place_after(text: str, depth: float) -> int:
    """The end of a sentence at or after this share of the text's characters (EasyContext); its beginning for 0."""
    ends = _sentence_ends(text)
    return ends[bisect.bisect_left(ends, int(depth * len(text)))]


def insert_all(text: str, pieces: Sequence[tuple[int, str]]) -> str:
    """Puts pieces in at places of the text as it was, all at once, so that none moves or cuts another."""
    parts, end = [], 0
    for place, piece in sorted(pieces, key=lambda item: item[0]):
        parts += [text[end:place], piece]
        end = place
    return "".join([*parts, text[end:]])
