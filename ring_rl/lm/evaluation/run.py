"""An evaluation: every sample of every cell asked in each mode, and written down as soon as it is answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ring_rl.kernels.layout import padded_length
from ring_rl.lm.evaluation.cells import MODE_NAMES, Cell, Mode, SampleRecord
from ring_rl.lm.evaluation.prompts import Prompter
from ring_rl.lm.evaluation.sample_log import SampleLog
from ring_rl.lm.evaluation.suite import Suite
from ring_rl.lm.evaluation.teacher_forced import teacher_forced
from ring_rl.lm.generate import GREEDY, Generator
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tasks.scorers import answer_hits, score
from ring_rl.lm.tokenizer.protocol import written_text
from ring_rl.nn.parallel import SequenceParallel

__all__ = ["Questioner", "QuestionsConfig", "Verdict", "evaluate", "missing_samples"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """How a model is asked.

    Attributes:
        modes: "teacher_forced", "generated" or both.
        batch_tokens: Of a batch's prompts together; a batch has at least one.
        chunk_size: Tokens of a prompt that generation reads at once.
    """

    modes: tuple[Mode, ...]
    batch_tokens: int
    chunk_size: int

    def __post_init__(self) -> None:
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"questions.modes must name at least one mode, and each once, got {list(self.modes)}")
        for name in ("batch_tokens", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"questions.{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one sample: tokens of its prompt, score, what was said, and how unlikely the answer was in nats."""

    tokens: int
    score: float
    output: str
    negative_log_likelihood: float | None


class Questioner:
    """A model that answers samples of a suite, a batch at a time.

    Args:
        model: As trained or loaded.
        prompter: The model's tokenizer, and what stands around a prompt.
        parallel: The mesh.
        questions: How it is asked.
    """

    def __init__(
        self, model: LanguageModel, prompter: Prompter, *, parallel: SequenceParallel, questions: QuestionsConfig
    ):
        self._model, self._parallel = model, parallel
        self.prompter, self.questions = prompter, questions
        self._generator: Generator | None = None
        chunks = model.config.transformer.feed_forward_chunks
        shares = padded_length(1, ring_size=parallel.ring_size, layout=parallel.layout) * parallel.ulysses_size
        self._length_multiple = chunks * shares

    def teacher_forced(self, samples: Sequence[Sample], *, batch_size: int) -> list[Verdict]:
        """In one pass; an answer counts if each of its tokens was the most likely one."""
        rows = [self.prompter.answered(sample) for sample in samples]
        forced = teacher_forced(
            self._model,
            rows,
            parallel=self._parallel,
            length_multiple=self._length_multiple,
            batch_size=batch_size,
        )
        return [
            Verdict(
                tokens=int(np.argmax(row.weights > 0)) + 1,
                score=float(np.mean(answer_hits(each.most_likely, each.targets, each.answer_ids))),
                output=written_text(each.most_likely, self.prompter.tokenizer),
                negative_log_likelihood=-float(np.mean(each.log_probabilities, dtype=np.float64)),
            )
            for row, each in zip(rows, forced, strict=True)
        ]

    def generated(self, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int) -> list[Verdict]:
        """Greedily, until the tokenizer's end of a text or `max_new_tokens`, and scored by the task's own rule."""
        if self._generator is None:
            self._generator = Generator(self._model, parallel=self._parallel, chunk_size=self.questions.chunk_size)
        prompts = [self.prompter.prompt(sample) for sample in samples]
        # A last, smaller batch is filled up with its last prompt, so that it is no program of its own.
        filled = [*prompts, *[prompts[-1]] * (batch_size - len(prompts))]
        eos = self.prompter.tokenizer.eos_id
        written = self._generator(
            filled, max_new_tokens=max_new_tokens, sampling=GREEDY, stop_ids=() if eos is None else (eos,)
        )
        texts = [written_text(tokens, self.prompter.tokenizer) for tokens in written.tokens[: len(prompts)]]
        return [
            Verdict(len(prompt), score(sample, text), text, None)
            for sample, prompt, text in zip(samples, prompts, texts, strict=True)
        ]


def missing_samples(
    suite: Suite, log: SampleLog[SampleRecord], modes: Sequence[Mode]
) -> dict[tuple[Mode, Cell], list[int]]:
    """For every mode and cell that is not complete, the samples that are still to be asked."""
    wanted: dict[tuple[Mode, Cell], list[int]] = {
        (mode, cell): [index for index in range(suite.samples) if cell.key(mode, index) not in log.records]
        for cell in suite.cells()
        for mode in modes
    }
    return {where: indices for where, indices in wanted.items() if indices}


def evaluate(
    questioner: Questioner,
    suite: Suite,
    log: SampleLog[SampleRecord],
    *,
    on_samples: Callable[[str, int], None],
) -> None:
    """Asks what the log lacks; `on_samples` hears which cell it was and how many samples of it were answered."""
    prompter, questions = questioner.prompter, questioner.questions
    for (mode, cell), indices in missing_samples(suite, log, questions.modes).items():
        # The same for all samples of a cell, also when it goes on after an interruption: one compiled program.
        rows = questions.batch_tokens // len(prompter.prompt(suite.sample(cell, 0)))
        batch_size = max(1, min(rows, suite.samples))
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            samples = [suite.sample(cell, index) for index in chosen]
            if mode == "teacher_forced":
                verdicts = questioner.teacher_forced(samples, batch_size=batch_size)
            else:
                verdicts = questioner.generated(
                    samples, max_new_tokens=suite.max_new_tokens(cell), batch_size=batch_size
                )
            log.append(
                _record(mode, cell, index, sample, suite, verdict)
                for index, sample, verdict in zip(chosen, samples, verdicts, strict=True)
            )
            on_samples(f"{cell}, {MODE_NAMES[mode]}", len(chosen))


def _record(mode: Mode, cell: Cell, index: int, sample: Sample, suite: Suite, verdict: Verdict) -> SampleRecord:
    return SampleRecord(
        mode=mode,
        task=cell.task,
        length=cell.length,
        depth=cell.depth,
        index=index,
        items=suite.items(sample),
        answer_depth=sample.depth,
        chance=suite.chance(sample),
        answers=sample.answers,
        **dataclasses.asdict(verdict),
    )
