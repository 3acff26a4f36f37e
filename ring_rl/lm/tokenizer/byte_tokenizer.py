"""UTF-8 bytes as tokens: any text, no file, 258 ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ring_rl.lm.tokenizer.protocol import check_ids
from ring_rl.typing import Int32

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 begins a sequence, 257 ends one."""

    vocabulary_size = 258
    bos_id = 256
    eos_id = 257

    def encode(self, text: str, /) -> Int32[np.ndarray, " T"]:
        """The text's UTF-8 bytes."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_with_spans(self, text: str, /) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, "T 2"]]:
        """Bytes, and the character that each is a part of."""
        ids = self.encode(text)
        # Bytes 10xxxxxx go on with a character, all others begin one.
        begins = np.cumsum((ids & 0xC0) != 0x80, dtype=np.int32) - 1
        return ids, np.stack([begins, begins + 1], axis=-1).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, /) -> str:
        """Bytes that form no character become U+FFFD, as a model may write them."""
        array = check_ids(ids, self.vocabulary_size)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_mapping(self) -> dict[str, Any]:
        """`{"name": "bytes"}`."""
        return {"name": "bytes"}
