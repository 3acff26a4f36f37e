"""Several vocabularies in one sequence: codes of other kinds of data beside text, as ids after the text's.

With text ids [0, V) and a modality of C codes:

    ids        0 .. V-1   V .. V+C-1   V+C       V+C+1          V+C+2
    meaning    text       codes        begins    next frame     ends       and so on, with the next modality

    a film of two frames   text ..., <begins>, codes, codes, <next frame>, codes, codes, <ends>, text ...

The markers and the order are those of the Large World Model (arXiv:2402.08268), whose released code gives
text and codes embeddings and heads of their own; here one embedding holds both, so that every model serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ring_rl.lm.documents.document import CodeSpan
from ring_rl.typing import Float32, Int, Int32

__all__ = ["KIND_TEXT", "KIND_UNWEIGHTED", "MixedVocabulary", "ModalityConfig", "TokenSpan"]

# What a token is, as the loss sees it; modality m has the kind KIND_TEXT + 1 + m.
KIND_UNWEIGHTED, KIND_TEXT = 0, 1
_MARKERS = 3
# Kinds are kept in a byte.
_MOST_MODALITIES = 254


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """A vocabulary of codes.

    Attributes:
        name: of the modality, as documents call it.
        codes: C, its codes are [0, C).
        loss_weight: what one of its tokens counts in the loss, markers included.
    """

    name: str
    codes: int
    loss_weight: float

    def __post_init__(self) -> None:
        if self.codes < 1:
            raise ValueError(f"modality {self.name} needs at least 1 code, got {self.codes}")
        if not self.loss_weight >= 0:
            raise ValueError(f"loss_weight of modality {self.name} must not be negative, got {self.loss_weight}")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSpan:
    """A stretch of text ids, as `MixedVocabulary.spans` finds it."""

    tokens: Int32[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedVocabulary:
    """Where text and each modality lie among the ids.

    Attributes:
        text_size: V, of the tokenizer.
        text_loss_weight: what a token of text counts in the loss.
        modalities: in the order of their ids.
    """

    text_size: int
    text_loss_weight: float
    modalities: tuple[ModalityConfig, ...]

    def __post_init__(self) -> None:
        names = [modality.name for modality in self.modalities]
        if len(set(names)) < len(names):
            raise ValueError(f"modalities must have names of their own, got {', '.join(names)}")
        if len(names) > _MOST_MODALITIES:
            raise ValueError(f"at most {_MOST_MODALITIES} modalities are told apart, got {len(names)}")
        if not self.text_loss_weight >= 0:
            raise ValueError(f"text_loss_weight must not be negative, got {self.text_loss_weight}")

    @property
    def size(self) -> int:
        """Ids in all: what the model's vocabulary must hold."""
        return self.text_size + sum(modality.codes + _MARKERS for modality in self.modalities)

    @property
    def weights(self) -> Float32[np.ndarray, " kinds"]:
        """What a token of each kind counts in the loss."""
        of_modalities = (modality.loss_weight for modality in self.modalities)
        return np.array([0.0, self.text_loss_weight, *of_modalities], np.float32)

    def kind(self, modality: str) -> int:
        """The kind of a modality's tokens.

        Raises:
            ValueError: there is no such modality.
        """
        return KIND_TEXT + 1 + self._number(modality)

    def tokens(self, span: CodeSpan) -> Int32[np.ndarray, " _"]:
        """The ids of a span of codes, markers included.

        Raises:
            ValueError: an unknown modality, no frame at all, or a code that its vocabulary lacks.
        """
        number = self._number(span.modality)
        first, codes = self._first(number), self.modalities[number].codes
        begins, next_frame, ends = self._markers(number)
        if not span.frames:
            raise ValueError(f"a span of {span.modality} needs at least one frame")
        pieces: list[Sequence[int] | np.ndarray] = [[begins]]
        for frame in span.frames:
            if len(frame) and not (frame.min() >= 0 and frame.max() < codes):
                raise ValueError(
                    f"{span.modality} has the codes 0 to {codes - 1}, got {frame.min()} to {frame.max()}; "
                    "set the modality's codes to the size of its codebook"
                )
            pieces += [frame + first, [next_frame]]
        pieces[-1] = [ends]
        return np.concatenate(pieces).astype(np.int32)

    def spans(self, tokens: Int[np.ndarray, " _"]) -> list[TokenSpan | CodeSpan]:
        """The inverse of writing spans one after another; a last span of codes may lack its end marker.

        Raises:
            ValueError: an id outside the vocabulary, or markers and codes where none can stand.
        """
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.size):
            raise ValueError(f"ids must be in [0, {self.size}), got {tokens.min()} to {tokens.max()}")
        found: list[TokenSpan | CodeSpan] = []
        at = 0
        while at < len(tokens):
            is_text = tokens[at:] < self.text_size
            if is_text[0]:
                stop = at + (len(is_text) if is_text.all() else int(np.argmin(is_text)))
                found.append(TokenSpan(tokens[at:stop].astype(np.int32)))
                at = stop
            else:
                span, at = self._read_codes(tokens, at)
                found.append(span)
        return found

    def _read_codes(self, tokens: np.ndarray, at: int) -> tuple[CodeSpan, int]:
        """The span of codes that begins at `at`, and where it stops."""
        number = next(
            number
            for number, modality in enumerate(self.modalities)
            if tokens[at] < self._first(number) + modality.codes + _MARKERS
        )
        modality, first = self.modalities[number], self._first(number)
        begins, next_frame, ends = self._markers(number)
        if tokens[at] != begins:
            raise ValueError(f"token {at} is of {modality.name}, but no {modality.name} has begun")
        frames, start = [], at + 1
        for here in range(start, len(tokens)):
            if tokens[here] in (next_frame, ends):
                frames.append((tokens[start:here] - first).astype(np.int32))
                start = here + 1
                if tokens[here] == ends:
                    return CodeSpan(modality.name, tuple(frames), weighted=True), start
            elif not first <= tokens[here] < first + modality.codes:
                raise ValueError(f"token {here} stands within {modality.name}, and is none of its codes")
        frames.append((tokens[start:] - first).astype(np.int32))
        return CodeSpan(modality.name, tuple(frames), weighted=True), len(tokens)

    def _number(self, name: str) -> int:
        names = [modality.name for modality in self.modalities]
        if name not in names:
            raise ValueError(
                f"there is no modality {name!r}; add it to documents.modalities ({', '.join(names) or 'none'} there)"
            )
        return names.index(name)

    def _markers(self, number: int) -> tuple[int, int, int]:
        """The ids that say: it begins, another frame follows, it ends."""
        after = self._first(number) + self.modalities[number].codes
        return after, after + 1, after + 2

    def _first(self, number: int) -> int:
        """The id of code 0."""
        return self.text_size + sum(modality.codes + _MARKERS for modality in self.modalities[:number])
