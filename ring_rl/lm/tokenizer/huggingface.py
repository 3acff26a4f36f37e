"""Tokenizers of the `tokenizers` library, as `tokenizer.json` describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ring_rl.lm.tokenizer.protocol import check_ids
from ring_rl.typing import Int32

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

__all__ = ["HuggingFaceTokenizer", "import_tokenizers", "tokenizer_from_folder"]


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Special tokens that stand in a text as themselves become their one id, as in the library.

    Args:
        text: the content of a `tokenizer.json`.
        bos_id: beginning of a sequence, which that file does not say.
        eos_id: end of a sequence, likewise.

    Raises:
        ImportError: the library is not installed.
        ValueError: the text is no tokenizer.
    """

    def __init__(self, text: str, *, bos_id: int | None, eos_id: int | None):
        try:
            backend: BackendTokenizer = import_tokenizers().Tokenizer.from_str(text)
        except ImportError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"this is no tokenizer.json that the tokenizers library reads: {error}") from None
        # Truncation and padding that the file may ask for are meant for batches of short texts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocabulary_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for name, token_id in (("bos_id", bos_id), ("eos_id", eos_id)):
            if token_id is not None and not 0 <= token_id < self.vocabulary_size:
                raise ValueError(f"{name} {token_id} is not in [0, {self.vocabulary_size}), the ids of this tokenizer")
        self.bos_id = bos_id
        self.eos_id = eos_id

    def encode(self, text: str, /) -> Int32[np.ndarray, " T"]:
        """Ids of the text alone."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_spans(self, text: str, /) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, "T 2"]]:
        """Ids and characters, as the library aligns them (some tokenizers leave a leading space out of a span)."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray, /) -> str:
        """Text of the ids without special tokens."""
        return self._backend.decode(check_ids(ids, self.vocabulary_size).tolist(), skip_special_tokens=True)

    def to_mapping(self) -> dict[str, Any]:
        """`{"name": "huggingface", "json": <text of tokenizer.json>, "bos_id": ..., "eos_id": ...}`."""
        return {
            "name": "huggingface",
            "json": self._backend.to_str(),
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }


def import_tokenizers() -> Any:
    """The `tokenizers` library, or an ImportError that says how to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"this tokenizer needs the tokenizers library: pip install 'ring_rl[lm]' ({error})") from None
    return tokenizers


def tokenizer_from_folder(folder: Path) -> HuggingFaceTokenizer:
    """The `tokenizer.json` of a model's folder.

    Which tokens begin and end a sequence is looked up in `tokenizer_config.json`, `special_tokens_map.json` and
    `config.json`, the first that says it.

    Raises:
        FileNotFoundError: there is no `tokenizer.json`.
        ValueError: a file is not valid.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json")
    text = path.read_text(encoding="utf-8")
    try:
        backend = import_tokenizers().Tokenizer.from_str(text)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no tokenizer that the tokenizers library reads: {error}") from None
    named = [_read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")]
    bos_id, eos_id = (_special_id(named, key, backend) for key in ("bos", "eos"))
    return HuggingFaceTokenizer(text, bos_id=bos_id, eos_id=eos_id)


def _special_id(named: Sequence[Mapping[str, Any]], key: str, backend: BackendTokenizer) -> int | None:
    for mapping in named:
        token = mapping.get(f"{key}_token")
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str) and (token_id := backend.token_to_id(token)) is not None:
            return token_id
        token_id = mapping.get(f"{key}_token_id")
        # Some models name several ends; the first is the one that ends a document.
        if isinstance(token_id, list) and token_id:
            token_id = token_id[0]
        if type(token_id) is int:
            return token_id
    return None


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    return content if isinstance(content, Mapping) else {}
