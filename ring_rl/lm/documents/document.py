"""What a document is, and what every kind of corpus can say about its documents."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

from ring_rl.typing import Int32

__all__ = [
    "CodeSpan",
    "Document",
    "DocumentSource",
    "Part",
    "PartOfDocuments",
    "Span",
    "TextSpan",
    "documents_in_order",
]

Part = Literal["all", "training", "held_out"]


@dataclasses.dataclass(frozen=True)
class TextSpan:
    """A stretch of text.

    Attributes:
        text: what the tokenizer reads.
        weighted: whether a loss is on its tokens; a question is read and not learnt.
    """

    text: str
    weighted: bool


@dataclasses.dataclass(frozen=True, eq=False)
class CodeSpan:
    """A stretch of codes of another vocabulary, such as the frames of a film after vector quantisation.

    Attributes:
        modality: the name of the vocabulary.
        frames: codes in [0, C) of each frame, each in one dimension.
        weighted: whether a loss is on them and on their markers.
    """

    modality: str
    frames: tuple[Int32[np.ndarray, " _"], ...]
    weighted: bool


Span = TextSpan | CodeSpan


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Spans that are read one after another, and apart from every other document.

    Attributes:
        name: where it comes from, for messages and results.
        spans: text and codes in order.
    """

    name: str
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The text spans, joined."""
        return "".join(span.text for span in self.spans if isinstance(span, TextSpan))


class DocumentSource(Protocol):
    """Documents by index; each is read when it is asked for."""

    def __len__(self) -> int:
        """The number of documents, known without reading them."""
        ...

    def name(self, index: int, /) -> str:
        """The name of document `index`, without reading it."""
        ...

    def document(self, index: int, /) -> Document:
        """Document `index`, a pure function of it.

        Raises:
            ValueError: it cannot be read as one; the message names the file and the place in it.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Another one if the documents are others, as far as their files' names, sizes and times tell."""
        ...


def documents_in_order(source: DocumentSource, *, seed: int | None, start: int) -> Iterator[Document]:
    """The documents one by one, from number `start` of the order on, so that reading goes on where it ended.

    Args:
        source: holds them.
        seed: of the order; None is the source's own, in which files are read from front to back.
        start: how many were read before.
    """
    order = np.arange(len(source)) if seed is None else np.random.default_rng(seed).permutation(len(source))
    for index in order[start:]:
        yield source.document(int(index))


class PartOfDocuments:
    """The documents of a source that are for training, or those that are held out.

    Which is decided by a document's name alone, so that it stays on its side when others come or go.

    Args:
        source: holds all of them.
        part: which ones.
        held_out_share: of all, on average, and chosen at random.
        held_out_names: documents that are held out besides.

    Raises:
        ValueError: the share is not in [0, 1], there is no document of such a name, or the part is empty.
    """

    def __init__(self, source: DocumentSource, *, part: Part, held_out_share: float, held_out_names: tuple[str, ...]):
        if not 0 <= held_out_share <= 1:
            raise ValueError(f"documents.held_out_share must be in [0, 1], got {held_out_share}")
        self._source = source
        self._settings = (part, repr(held_out_share), *held_out_names)
        names = [source.name(index) for index in range(len(source))]
        if missing := sorted(set(held_out_names) - set(names)):
            raise ValueError(f"documents.held_out_names holds {missing[0]}, but there is no such document; remove it")

        def belongs(name: str) -> bool:
            held_out = name in held_out_names or _position(name) < held_out_share
            return part == "all" or held_out == (part == "held_out")

        self._chosen = [index for index, name in enumerate(names) if belongs(name)]
        if not self._chosen:
            raise ValueError(
                f"documents.part={part} with held_out_share={held_out_share} leaves none of {len(source)} documents; "
                "choose another share or part=all"
            )

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        """As in the source."""
        return self._source.name(self._chosen[index])

    def document(self, index: int) -> Document:
        """As in the source."""
        return self._source.document(self._chosen[index])

    @property
    def fingerprint(self) -> str:
        """The source's, and which part this is."""
        if self._settings[0] == "all":
            return self._source.fingerprint
        return digest(self._source.fingerprint, *self._settings)


def digest(*parts: str) -> str:
    """A short fingerprint of texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _position(name: str) -> float:
    """A document's fixed place in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
