"""What the language half asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ring_rl.typing import Int32

__all__ = ["Tokenizer", "check_ids", "written_text"]


class Tokenizer(Protocol):
    """Text to ids and back.

    Encoding never adds a beginning or an end: whoever builds a prompt puts `bos_id` in front where the model was
    trained so (`ring_rl.lm.tasks.answer_row` has the switch).
    """

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id: rows that an embedding table needs."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Beginning of a sequence, where the tokenizer has one."""
        ...

    @property
    def eos_id(self) -> int | None:
        """End of a sequence, where the tokenizer has one."""
        ...

    def encode(self, text: str, /) -> Int32[np.ndarray, " T"]:
        """Ids of a text, without special tokens around it.

        Raises:
            ValueError: the tokenizer has no id for a part of the text.
        """
        ...

    def encode_with_spans(self, text: str, /) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, "T 2"]]:
        """Ids, and for each the characters [begin, end) of the text that it stands for.

        A character of several tokens belongs to each of them.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray, /) -> str:
        """Text of ids; special tokens are left out.

        Raises:
            ValueError: an id is negative or not in the vocabulary.
        """
        ...

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain JSON, for checkpoints; `tokenizer_from_mapping` is the inverse."""
        ...


def written_text(ids: Int32[np.ndarray, " T"], tokenizer: Tokenizer) -> str:
    """Text of what a model wrote.

    Models may have more tokens than their tokenizer: rows that fill up the embedding, codes of other modalities. None
    of them is text, and they are left out as special tokens are.
    """
    return tokenizer.decode(ids[ids < tokenizer.vocabulary_size])


def check_ids(ids: Sequence[int] | np.ndarray, vocabulary_size: int) -> np.ndarray:
    """`ids` as an int64 array, or a ValueError that names the first one outside the vocabulary."""
    array = np.asarray(ids, np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= vocabulary_size)]
    if len(outside):
        raise ValueError(f"token id {outside[0]} is not in [0, {vocabulary_size}), the ids of this tokenizer")
    return array
