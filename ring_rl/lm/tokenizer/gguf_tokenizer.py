"""The byte-level BPE tokenizer inside a GGUF file.

A GGUF file holds the tokens, their types and the merges, and says by a name (`tokenizer.ggml.pre`) how the text is cut
before merging; what that name means stands in llama.cpp's `src/llama-vocab.cpp`, and `_CUTS` says it for the names
that are known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ring_rl.lm.tokenizer.huggingface import HuggingFaceTokenizer, import_tokenizers

__all__ = ["tokenizer_from_gguf"]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Regular expressions, one after another, each of which isolates its matches in the pieces so far.
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
}
# Names of tokenizers that take a piece which is a token whole, whatever the merges make of it.
_WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3")

# tokenizer.ggml.token_type: read from a text as one token although no merge leads there.
_CONTROL, _USER_DEFINED = 3, 4

_NAME_ANOTHER = '"model.tokenizer={name: file, path: ...}"'


def tokenizer_from_gguf(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a GGUF file, built anew in the `tokenizers` library.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: `gguf` or `tokenizers` is not installed.
        ValueError: the file is no GGUF, or its tokenizer is of another kind than byte-level BPE.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    fields = _fields(path)
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"{path} holds a tokenizer of the kind {kind!r}; only byte-level BPE ('gpt2') is read from GGUF files: "
            f"give the model's tokenizer.json or tokenizer.model instead: {_NAME_ANOTHER}"
        )
    cut = fields.get("tokenizer.ggml.pre")
    if cut not in _CUTS:
        raise ValueError(
            f"{path} cuts its text as {cut!r}, which is not known here (known: {', '.join(_CUTS)}); "
            f"give the model's tokenizer.json instead: {_NAME_ANOTHER}"
        )
    tokens: list[str] = fields.get("tokenizer.ggml.tokens") or []
    merges: list[str] = fields.get("tokenizer.ggml.merges") or []
    if not tokens or not merges:
        raise ValueError(f"{path} holds {len(tokens)} tokens and {len(merges)} merges; a tokenizer needs both")
    types: list[int] = fields.get("tokenizer.ggml.token_type") or []
    return HuggingFaceTokenizer(
        _tokenizer_json(tokens, merges, types, _CUTS[cut], whole_tokens_first=cut in _WHOLE_TOKENS_FIRST),
        bos_id=_optional_id(fields, "bos"),
        eos_id=_optional_id(fields, "eos"),
    )


def _tokenizer_json(
    tokens: list[str], merges: list[str], types: list[int], cuts: tuple[str, ...], *, whole_tokens_first: bool
) -> str:
    library = import_tokenizers()
    pre, token = library.pre_tokenizers, library.AddedToken
    vocabulary = {text: index for index, text in enumerate(tokens)}
    # A token holds no space itself (a byte-level space is a letter), so the first space separates the two halves.
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_tokens_first))
    backend.pre_tokenizer = pre.Sequence(
        [
            *(pre.Split(library.Regex(expression), behavior="isolated") for expression in cuts),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = library.decoders.ByteLevel()
    special = [text for text, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    added = [text for text, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens([token(text, normalized=False, special=True) for text in special])
    backend.add_tokens([token(text, normalized=False, special=False) for text in added])
    return backend.to_str()


def _fields(path: Path) -> dict[str, Any]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"GGUF files need the gguf library: pip install 'ring_rl[lm]' ({error})") from None
    try:
        reader = GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.ggml.")}
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no GGUF file that can be read: {error}") from None


def _optional_id(fields: dict[str, Any], name: str) -> int | None:
    token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
    return None if token_id is None else int(token_id)
