"""One question about a long text, and the answer that it asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Sample"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and its answers, as text.

    Attributes:
        task: Whose scorer applies (`ring_rl.lm.tasks.scorers.SCORERS`).
        prompt: What a model reads, up to the end of the question.
        answer_prefix: The beginning of the answer, which is given to the model where it is to complete a text; "" where
            it is asked as in a chat.
        completion: How the text goes on after `answer_prefix` if everything is right, for training and teacher forcing.
            It holds the answers in their order.
        answers: What a right answer says, each once.
        length: Lines or tokens asked for, as the task counts.
        depth: Where in the text the answer stands, 0 its beginning and 1 its end; None where it stands in many places.
        details: More about it, plain JSON: keys, positions, numbers of lines.
    """

    task: str
    prompt: str
    answer_prefix: str
    completion: str
    answers: tuple[str, ...]
    length: int
    depth: float | None
    details: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError(f"a sample of {self.task} needs at least one answer")
        self.answer_spans()

    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """Where in `completion` each answer stands, as [begin, end) characters.

        Raises:
            ValueError: an answer is not there after the one before it.
        """
        spans, end = [], 0
        for answer in self.answers:
            begin = self.completion.find(answer, end)
            if begin < 0 or not answer:
                raise ValueError(f"the answer {answer!r} does not stand in the completion {self.completion[end:]!r}")
            end = begin + len(answer)
            spans.append((begin, end))
        return tuple(spans)
