"""RULER at a length: contexts as large as a number of tokens holds, counted with the model's own tokenizer."""

from __future__ import annotations

import numpy as np

from ring_rl.lm.tasks.ruler_tasks import RULER_TASKS, RulerDraft, RulerTaskName
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["RulerSource"]

# The sizes of contexts must not depend on which sample is drawn first.
_FITTING_SEED = 0


class RulerSource:
    """Draws samples of one task at one length.

    The size of the context is searched for once, as RULER does, so that samples of a length hold equally many
    sentences or words; a sample that turns out too long is drawn again, a little smaller.

    Args:
        task: Which of RULER's.
        length: Tokens of prompt, answer prefix and `room` together, at most.
        room: Tokens kept free for a template and the answer; RULER's own number is
            `RULER_TASKS[task].tokens_to_generate`.
        tokenizer: That counts the tokens.

    Raises:
        ImportError: the task's words are not installed.
        ValueError: the smallest context does not fit, or all words there are fill less than nine tenths of the length.
    """

    def __init__(self, task: RulerTaskName, *, length: int, room: int, tokenizer: Tokenizer):
        if task not in RULER_TASKS:
            raise ValueError(f"RULER has no task {task!r} here; there are {', '.join(RULER_TASKS)}")
        self._task, self._length, self._tokenizer = RULER_TASKS[task], length, tokenizer
        self._tokens = length - room
        self._largest = self._task.largest()
        self.size = self._fit()

    def sample(self, generator: np.random.Generator, *, depth: float | None = None) -> Sample:
        """A sample.

        Args:
            generator: Of all that is random.
            depth: Where a needle is hidden, in [0, 1]; None draws it. The other tasks have none.

        Raises:
            ValueError: a depth where the task has none, or outside [0, 1].
        """
        if depth is not None and not (self._task.name.startswith("niah") and 0 <= depth <= 1):
            raise ValueError(f"a depth in [0, 1] goes with RULER's needles, got {depth} with {self._task.name}")
        size = self.size
        while True:
            draft = self._draw(generator, size, depth)
            if self._count(draft) <= self._tokens or size == self._task.smallest:
                break
            size = max(size - max(size // 100, 1), self._task.smallest)
        if (tokens := self._count(draft)) > self._tokens:
            raise ValueError(self._too_short(tokens))
        return Sample(
            task=self._task.name,
            prompt=draft.prompt,
            answer_prefix=draft.answer_prefix,
            completion=draft.completion,
            answers=draft.answers,
            length=self._length,
            depth=draft.depth,
            details=draft.details,
        )

    def _fit(self) -> int:
        """The largest size that fits, by doubling and then halving."""
        low = self._task.smallest
        if (tokens := self._tokens_at(low)) > self._tokens:
            raise ValueError(self._too_short(tokens))
        high = self._capped(2 * low)
        while high > low and (tokens := self._tokens_at(high)) <= self._tokens:
            low, high = high, self._capped(2 * high)
        if high == low:
            if tokens < 0.9 * self._tokens:
                raise ValueError(
                    f"{self._task.name} has {low} words, which fill {tokens} of {self._tokens} tokens; "
                    "ask for a smaller length"
                )
            return low
        while high - low > 1:
            middle = (low + high) // 2
            if self._tokens_at(middle) <= self._tokens:
                low = middle
            else:
                high = middle
        return low

    def _capped(self, size: int) -> int:
        return size if self._largest is None else min(size, self._largest)

    def _tokens_at(self, size: int) -> int:
        return self._count(self._draw(np.random.default_rng(_FITTING_SEED), size, None))

    def _draw(self, generator: np.random.Generator, size: int, depth: float | None) -> RulerDraft:
        return self._task.draw(generator, size, self._length, depth)

    def _count(self, draft: RulerDraft) -> int:
        return len(self._tokenizer.encode(draft.prompt + draft.answer_prefix))

    def _too_short(self, tokens: int) -> str:
        return (
            f"the smallest context of {self._task.name} takes {tokens} tokens, {self._tokens} are left of a length of "
            f"{self._length}; ask for a greater length"
        )
