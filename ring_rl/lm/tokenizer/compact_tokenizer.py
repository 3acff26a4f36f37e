"""The vocabulary of compact line retrieval (`ring_rl.lm.tasks.compact_lines`)."""

from __future__ import annotations

from ring_rl.lm.key_words import KeyWords
from ring_rl.lm.tokenizer.word_tokenizer import WordTokenizer

__all__ = ["ASK", "FIRST_DIGIT", "IS", "LINE", "compact_tokenizer"]

_MARKS = ("LINE", "ASK", "IS")
LINE, ASK, IS = range(len(_MARKS))
# Of the ids of 0, 1, ... 9, which follow each other.
FIRST_DIGIT = len(_MARKS)


def compact_tokenizer(words: KeyWords) -> WordTokenizer:
    """Marks, digits, then the words of keys."""
    return WordTokenizer((*_MARKS, *"0123456789", *dict.fromkeys((*words.adjectives, *words.nouns))))
