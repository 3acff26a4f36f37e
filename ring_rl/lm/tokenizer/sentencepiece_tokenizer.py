"""SentencePiece models, as LLaMA and Mistral shipped them (`tokenizer.model`)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from ring_rl.lm.tokenizer.protocol import check_ids
from ring_rl.typing import Int32

__all__ = ["SentencePieceTokenizer"]


class SentencePieceTokenizer:
    """A SentencePiece model. Control tokens are never read from a text: "</s>" in a text is three characters.

    Args:
        model: the bytes of a `tokenizer.model`.

    Raises:
        ImportError: the library is not installed.
        ValueError: the bytes are no model.
    """

    def __init__(self, model: bytes):
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                f"this tokenizer needs the sentencepiece library: pip install 'ring_rl[lm]' ({error})"
            ) from None
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocabulary_size = int(self._processor.vocab_size())
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"these {len(model)} bytes are no SentencePiece model: {error}") from None
        if not self.vocabulary_size:
            raise ValueError(f"these {len(model)} bytes are no SentencePiece model: it holds no pieces")
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())

    def encode(self, text: str, /) -> Int32[np.ndarray, " T"]:
        """Ids of the text; models with a dummy prefix put a space before its first word."""
        return np.array(self._processor.encode(text, return_type=int), np.int32)

    def encode_with_spans(self, text: str, /) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, "T 2"]]:
        """Ids and characters; a dummy prefix stands for none."""
        found: Any = self._processor.encode(text, return_type="offset_mapping")
        return np.array(found["ids"], np.int32), np.array(found["offsets"], np.int32).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray, /) -> str:
        """Text of the ids; control tokens are left out."""
        return self._processor.decode(check_ids(ids, self.vocabulary_size).tolist())

    def to_mapping(self) -> dict[str, Any]:
        """`{"name": "sentencepiece", "model_base64": ...}`."""
        return {"name": "sentencepiece", "model_base64": base64.b64encode(self._model).decode("ascii")}


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
