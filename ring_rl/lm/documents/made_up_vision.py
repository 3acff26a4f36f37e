"""Films that nobody made: codes that obey a rule which a line of text tells, before the film or after it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from ring_rl.lm.documents.document import CodeSpan, Document, TextSpan, digest

__all__ = ["MadeUpVision", "MadeUpVisionConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUpVisionConfig:
    """Films of codes, with a line about each.

    Attributes:
        name: "made_up_vision".
        documents: how many.
        modality: whose codes they are.
        codes: C, of the modality.
        frames: of a film.
        codes_per_frame: tokens of a frame.
        seed: of the films.
    """

    name: Literal["made_up_vision"]
    documents: int
    modality: str
    codes: int
    frames: int
    codes_per_frame: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("documents", "codes", "frames", "codes_per_frame"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class MadeUpVision:
    """A `DocumentSource` of films whose frame f has at place p the code (start + f step + p) mod C.

    Whoever reads "start 3 step 2" can tell every code that follows; whoever saw the film can tell the line. Even
    documents have the line first (text to film), odd ones last (film to text).
    """

    def __init__(self, config: MadeUpVisionConfig):
        self._config = config

    def __len__(self) -> int:
        return self._config.documents

    def name(self, index: int) -> str:
        """The number of the film."""
        return f"film_{index:06d}"

    def document(self, index: int) -> Document:
        """Film and line."""
        config = self._config
        generator = np.random.default_rng([config.seed, index])
        start, step = (int(number) for number in generator.integers(config.codes, size=2))
        frames = start + step * np.arange(config.frames)[:, None] + np.arange(config.codes_per_frame)
        film = CodeSpan(config.modality, tuple((frames % config.codes).astype(np.int32)), weighted=True)
        line = TextSpan(f"start {start} step {step}", weighted=True)
        return Document(self.name(index), (line, film) if index % 2 == 0 else (film, line))

    @property
    def fingerprint(self) -> str:
        """Of the settings."""
        return digest(repr(self._config))
