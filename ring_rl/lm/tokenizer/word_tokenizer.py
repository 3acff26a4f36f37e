"""Whole words as tokens, for texts of a closed vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ring_rl.lm.tokenizer.protocol import check_ids
from ring_rl.typing import Int32

__all__ = ["WordTokenizer"]

# Only what separates words here: other white space would be a part of a word, and unknown.
_WORD = re.compile(r"[^ \n]+")


class WordTokenizer:
    """Id i is the i-th word; spaces and newlines separate words and are not kept.

    So `decode` writes one space between two words, and `encode(decode(ids))` gives the ids again.

    Args:
        words: each once, without spaces or newlines.

    Raises:
        ValueError: no words, a word twice, or one that holds a separator.
    """

    bos_id = None
    eos_id = None

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        if not self.words:
            raise ValueError("a word tokenizer needs at least one word")
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = next(word for index, word in enumerate(self.words) if self._ids[word] != index)
            raise ValueError(f"the word {twice!r} stands twice in the vocabulary; give each word once")
        for word in self.words:
            if not _WORD.fullmatch(word):
                raise ValueError(f"{word!r} is no word: spaces and newlines separate words")

    @property
    def vocabulary_size(self) -> int:
        """How many words."""
        return len(self.words)

    def encode(self, text: str, /) -> Int32[np.ndarray, " T"]:
        """Ids of the words, in their order."""
        return np.array([self._id(word) for word in _WORD.findall(text)], np.int32)

    def encode_with_spans(self, text: str, /) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, "T 2"]]:
        """Ids, and where each word stands."""
        matches = list(_WORD.finditer(text))
        ids = np.array([self._id(match.group()) for match in matches], np.int32)
        return ids, np.array([match.span() for match in matches], np.int32).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray, /) -> str:
        """The words, a space between two."""
        return " ".join(self.words[index] for index in check_ids(ids, self.vocabulary_size))

    def to_mapping(self) -> dict[str, Any]:
        """`{"name": "words", "words": [...]}`."""
        return {"name": "words", "words": list(self.words)}

    def _id(self, word: str) -> int:
        try:
            return self._ids[word]
        except KeyError:
            raise ValueError(
                f"the word {word!r} is not among the {len(self.words)} of this tokenizer; "
                "a tokenizer of bytes takes any text"
            ) from None
