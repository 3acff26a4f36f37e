"""Documents become tokens, once: kept in memory, or in a cache folder from which they are mapped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ring_rl.atomic_file import atomic_file, write_whole
from ring_rl.lm.documents.document import Document, DocumentSource, TextSpan, digest, documents_in_order
from ring_rl.lm.documents.modality import KIND_TEXT, KIND_UNWEIGHTED, MixedVocabulary
from ring_rl.lm.documents.tokenized import TokenizedDocument, TokenizedDocuments, TokenizedPart
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["DocumentTokens", "tokenize_documents"]

# Of a part: what an interruption loses at most.
_PART_TOKENS = 1 << 24
_SETTINGS = "settings.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentTokens:
    """How one document becomes tokens.

    Attributes:
        tokenizer: of its text, each span by itself.
        vocabulary: of text and codes.
        begin_token: whether the tokenizer's begin token comes first.
        end_token: whether its end token comes last, and is learnt as text is.

    Raises:
        ValueError: the tokenizer has no such token, or another vocabulary.
    """

    tokenizer: Tokenizer
    vocabulary: MixedVocabulary
    begin_token: bool
    end_token: bool

    def __post_init__(self) -> None:
        if self.vocabulary.text_size != self.tokenizer.vocabulary_size:
            raise ValueError(
                f"the vocabulary counts {self.vocabulary.text_size} ids of text, the tokenizer "
                f"{self.tokenizer.vocabulary_size}"
            )
        for wanted, token, name in (
            (self.begin_token, self.tokenizer.bos_id, "begin"),
            (self.end_token, self.tokenizer.eos_id, "end"),
        ):
            if wanted and token is None:
                raise ValueError(f"the tokenizer has no {name} token; set documents.{name}_token=false")

    @property
    def fingerprint(self) -> str:
        """Of all that the tokens depend on besides the document; loss weights are not among it."""
        modalities = [[modality.name, modality.codes] for modality in self.vocabulary.modalities]
        return digest(
            json.dumps(self.tokenizer.to_mapping(), sort_keys=True),
            json.dumps([modalities, self.begin_token, self.end_token]),
        )

    def __call__(self, document: Document) -> TokenizedDocument:
        """The document's tokens.

        Raises:
            ValueError: codes that the vocabulary lacks; the message begins with the document's name.
        """
        tokens, kinds = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)]

        def append(ids: np.ndarray, kind: int) -> None:
            tokens.append(np.asarray(ids, np.int32))
            kinds.append(np.full(len(ids), kind, np.uint8))

        if self.begin_token:
            append(np.array([self.tokenizer.bos_id]), KIND_UNWEIGHTED)
        for span in document.spans:
            if isinstance(span, TextSpan):
                append(self.tokenizer.encode(span.text), KIND_TEXT if span.weighted else KIND_UNWEIGHTED)
                continue
            try:
                ids, kind = self.vocabulary.tokens(span), self.vocabulary.kind(span.modality)
            except ValueError as error:
                raise ValueError(f"{document.name}: {error}") from None
            append(ids, kind if span.weighted else KIND_UNWEIGHTED)
        if self.end_token:
            append(np.array([self.tokenizer.eos_id]), KIND_TEXT)
        return TokenizedDocument(document.name, np.concatenate(tokens), np.concatenate(kinds))


def tokenize_documents(
    source: DocumentSource, document_tokens: DocumentTokens, *, cache: Path | None, progress: bool
) -> TokenizedDocuments:
    """All documents of a source as tokens.

    Args:
        source: holds the documents; each is read once, from front to back.
        document_tokens: how one becomes tokens.
        cache: a folder that keeps the tokens, 3 bytes each (5 beyond a vocabulary of 65,536), so that they are made
            once and need no memory; it goes on after the last part that an interrupted call finished. Null keeps
            them in memory.
        progress: whether to show a bar with the time left, on a terminal.

    Raises:
        ValueError: a bad document; or the cache holds tokens of other documents or another tokenizer.
        OSError: the cache cannot be written.
    """
    size, kinds = document_tokens.vocabulary.size, len(document_tokens.vocabulary.weights)
    parts: list[TokenizedPart] = []
    if cache is not None:
        _claim(cache, digest(source.fingerprint, document_tokens.fingerprint))
        parts = list(_saved_parts(cache))
    done = sum(len(part.names) for part in parts)
    pending: list[TokenizedDocument] = []
    pending_tokens = 0

    def finish_part() -> None:
        part = TokenizedPart.of(pending, vocabulary_size=size, kinds=kinds)
        pending.clear()
        parts.append(part if cache is None else _save_part(cache, len(parts), part))

    with _bar(shown=progress) as bar:
        job = bar.add_task("tokenizing", total=len(source), completed=done)
        for document in documents_in_order(source, seed=None, start=done):
            pending.append(document_tokens(document))
            pending_tokens += len(pending[-1].tokens)
            bar.advance(job)
            if pending_tokens >= _PART_TOKENS:
                finish_part()
                pending_tokens = 0
        if pending:
            finish_part()
    return TokenizedDocuments(parts, vocabulary_size=size)


def _claim(cache: Path, fingerprint: str) -> None:
    """Writes down whose tokens these are, or checks it."""
    cache.mkdir(parents=True, exist_ok=True)
    settings = cache / _SETTINGS
    if not settings.exists():
        # Hidden files are another process' unfinished ones: several may make the same cache, with the same contents.
        if left_over := sorted(path.name for path in cache.iterdir() if not path.name.startswith(".")):
            raise ValueError(f"documents.token_cache={cache} holds {left_over[0]} already; name an empty folder")
        write_whole(settings, json.dumps({"fingerprint": fingerprint}) + "\n")
    if json.loads(settings.read_text()) != {"fingerprint": fingerprint}:
        raise ValueError(
            f"documents.token_cache={cache} holds the tokens of other documents, or of another tokenizer, or the "
            "documents changed since; name another folder or remove it"
        )


def _save_part(cache: Path, number: int, part: TokenizedPart) -> TokenizedPart:
    """Writes a part; its list of documents comes last, so that what has one is whole."""
    for name, array in (("tokens", part.tokens), ("kinds", part.kinds)):
        with atomic_file(cache / f"{name}_{number:05d}.npy", overwrite=True) as temporary:
            np.save(temporary, array)
    listed = {"names": part.names, "lengths": part.lengths.tolist(), "kind_counts": part.kind_counts.tolist()}
    write_whole(cache / f"documents_{number:05d}.json", json.dumps(listed) + "\n")
    return _load_part(cache, number)


def _saved_parts(cache: Path) -> Iterator[TokenizedPart]:
    number = 0
    while (cache / f"documents_{number:05d}.json").exists():
        yield _load_part(cache, number)
        number += 1


def _load_part(cache: Path, number: int) -> TokenizedPart:
    """A part, its tokens mapped."""
    listed = json.loads((cache / f"documents_{number:05d}.json").read_text())
    tokens, kinds = (_mapped(cache / f"{name}_{number:05d}.npy") for name in ("tokens", "kinds"))
    lengths = np.array(listed["lengths"], np.int64)
    if not lengths.sum() == len(tokens) == len(kinds):
        raise ValueError(f"documents.token_cache={cache} is damaged in part {number}; remove the folder")
    return TokenizedPart(tuple(listed["names"]), lengths, tokens, kinds, np.array(listed["kind_counts"], np.int64))


def _mapped(path: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)


def _bar(*, shown: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents, left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    )
