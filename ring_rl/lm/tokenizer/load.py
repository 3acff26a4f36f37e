"""A tokenizer from a configuration, and from what a checkpoint keeps of one."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ring_rl.lm.key_words import WordList, key_words
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.lm.tokenizer.compact_tokenizer import compact_tokenizer
from ring_rl.lm.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from ring_rl.lm.tokenizer.huggingface import HuggingFaceTokenizer, tokenizer_from_folder
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.lm.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from ring_rl.lm.tokenizer.word_tokenizer import WordTokenizer

__all__ = [
    "ByteTokenizerConfig",
    "CompactLinesTokenizerConfig",
    "FileTokenizerConfig",
    "TokenizerConfig",
    "WordTokenizerConfig",
    "load_tokenizer",
    "tokenizer_from_mapping",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizerConfig:
    """UTF-8 bytes."""

    name: Literal["bytes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordTokenizerConfig:
    """Whole words.

    Attributes:
        path: a text file of the vocabulary, one word a line; its first line has id 0.
    """

    name: Literal["words"]
    path: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTokenizerConfig:
    """A model's own tokenizer.

    Attributes:
        path: a `tokenizer.json`, a `tokenizer.model` (SentencePiece), a `.gguf`, or a folder that holds one of the
            first two, the first being preferred.
    """

    name: Literal["file"]
    path: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactLinesTokenizerConfig:
    """The words of compact line retrieval.

    Attributes:
        words: Which list its keys are from.
    """

    name: Literal["compact_lines"]
    words: WordList


TokenizerConfig = ByteTokenizerConfig | WordTokenizerConfig | FileTokenizerConfig | CompactLinesTokenizerConfig


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a configuration names.

    Raises:
        FileNotFoundError: its file is not there.
        ImportError: its library is not installed.
        ValueError: its file holds none.
    """
    match config:
        case ByteTokenizerConfig():
            return ByteTokenizer()
        case CompactLinesTokenizerConfig(words=words):
            return compact_tokenizer(key_words(words))
        case WordTokenizerConfig(path=path):
            _require_file(path)
            return WordTokenizer(path.read_text(encoding="utf-8").splitlines())
        case FileTokenizerConfig(path=path):
            return _from_file(path)


def tokenizer_from_mapping(mapping: Mapping[str, Any]) -> Tokenizer:
    """The inverse of `Tokenizer.to_mapping`.

    Raises:
        ImportError: its library is not installed.
        ValueError: this is no tokenizer's mapping.
    """
    try:
        match mapping["name"]:
            case "bytes":
                return ByteTokenizer()
            case "words":
                return WordTokenizer(mapping["words"])
            case "huggingface":
                return HuggingFaceTokenizer(mapping["json"], bos_id=mapping["bos_id"], eos_id=mapping["eos_id"])
            case "sentencepiece":
                return SentencePieceTokenizer(base64.b64decode(mapping["model_base64"], validate=True))
            case other:
                raise ValueError(
                    f"there is no tokenizer named {other!r}; the names are bytes, words, huggingface, sentencepiece"
                )
    except KeyError as error:
        raise ValueError(f"a tokenizer's mapping lacks the key {error}; it holds {sorted(mapping)}") from None
    except binascii.Error as error:
        raise ValueError(f"a SentencePiece tokenizer's mapping is damaged: {error}") from None


def _from_file(path: Path) -> Tokenizer:
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return tokenizer_from_folder(path)
        if (path / "tokenizer.model").is_file():
            return SentencePieceTokenizer((path / "tokenizer.model").read_bytes())
        raise FileNotFoundError(f"{path} holds neither tokenizer.json nor tokenizer.model")
    _require_file(path)
    if path.suffix == ".json":
        return tokenizer_from_folder(path.parent) if path.name == "tokenizer.json" else _from_json(path)
    if path.suffix == ".gguf":
        return tokenizer_from_gguf(path)
    return SentencePieceTokenizer(path.read_bytes())


def _from_json(path: Path) -> Tokenizer:
    """A `tokenizer.json` under another name has no neighbours that say how sequences begin and end."""
    return HuggingFaceTokenizer(path.read_text(encoding="utf-8"), bos_id=None, eos_id=None)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer at {path}")
