"""What an evaluation is made of: cells (a task at a length, and at a depth), and one record a sample of a cell."""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["MODES", "MODE_NAMES", "Cell", "Mode", "SampleKey", "SampleRecord"]

Mode = Literal["teacher_forced", "generated"]
MODES: tuple[Mode, ...] = ("teacher_forced", "generated")
# What tables and pictures call them: the two are never added up.
MODE_NAMES: dict[Mode, str] = {"teacher_forced": "teacher-forced", "generated": "generated"}

SampleKey = tuple[Mode, str, int, float | None, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A task at one length, and at one depth where the task has one.

    Attributes:
        task: "line_retrieval", "needle", "niah_multikey_2", ...
        length: Tokens of the whole prompt at most, or lines where the suite counts lines.
        depth: Where the answer is put: 0 at the beginning, 1 at the end; None where it falls by chance.
    """

    task: str
    length: int
    depth: float | None

    def __str__(self) -> str:
        return f"{self.task} {self.length}" + ("" if self.depth is None else f" depth {self.depth:g}")

    def key(self, mode: Mode, index: int) -> SampleKey:
        """What one sample of this cell is found by."""
        return (mode, self.task, self.length, self.depth, index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One sample and what the model made of it: a line of `samples.jsonl`.

    Attributes:
        mode: "teacher_forced": the answer stands behind the prompt, and each of its tokens must be the most likely one
            there: one pass, no cache. "generated": the model writes, greedily, and the task's own scorer reads.
        task: Of the cell.
        length: Of the cell.
        depth: Of the cell.
        index: Of the sample in its cell.
        tokens: The prompt's, as the model reads it.
        items: Lines, needles or whatever the prompt lists; None where it lists nothing.
        answer_depth: Where what is asked for stands in the prompt, 0 to 1; None where it stands in several places.
        score: 1 for a right answer, 0 for a wrong one, a share where there are several to give.
        chance: The score of guessing one of the candidates that the prompt names.
        answers: What was wanted.
        output: What was written; teacher-forced, the most likely token at each of the answer's places.
        negative_log_likelihood: Mean over the answer's tokens, in nats; None for generated answers.
    """

    mode: Mode
    task: str
    length: int
    depth: float | None
    index: int
    tokens: int
    items: int | None
    answer_depth: float | None
    score: float
    chance: float
    answers: tuple[str, ...]
    output: str
    negative_log_likelihood: float | None

    @property
    def key(self) -> SampleKey:
        """What it is found by."""
        return (self.mode, self.task, self.length, self.depth, self.index)
