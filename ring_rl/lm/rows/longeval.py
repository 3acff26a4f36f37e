"""LongEval's records of lines as text, with several of its questions after each."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

import numpy as np

from ring_rl.lm.key_words import WordList, key_words
from ring_rl.lm.rows.loss_on import LossOn, weighted
from ring_rl.lm.rows.short_records import ShortRecords
from ring_rl.lm.tasks.line_retrieval import AnswerStart, IndexKind, draw_lines
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["LongEvalConfig", "LongEvalData", "questions_and_answers"]

_LINE = re.compile(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE)
# Records differ in tokens by their words and digits; rows have this much more room than those that were measured.
_MARGIN = 1.02
_MEASURED = 4
# Times that a record is drawn anew that is longer than its row all the same.
_REDRAWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongEvalConfig:
    """Fresh records in LongEval's wording, in the model's own tokens.

    Attributes:
        name: "longeval".
        index_kind: What names a line.
        words: Where names are words.
        answer_start: How an answer begins; ask as you will evaluate.
        queries: Questions after a record, at most; LongEval asks one, which teaches little a row.
        fewest_lines: Of the short records.
        begin_with_bos: Whether the tokenizer's beginning goes in front, where it has one.
        loss_on: "answers" learns the numbers after questions, "everywhere" all of the text.
    """

    name: Literal["longeval"]
    index_kind: IndexKind
    words: WordList
    answer_start: AnswerStart
    queries: int
    fewest_lines: int
    begin_with_bos: bool
    loss_on: LossOn

    def __post_init__(self) -> None:
        for name in ("queries", "fewest_lines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def questions_and_answers(
    sample: Sample, generator: np.random.Generator, *, queries: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """The sample's own question and further ones in the same words, each about another line.

    Returns:
        The record with its header, as one element of a list, then for each question its text up to the answer, and
        the text and the number of its answer.
    """
    lines = _LINE.findall(sample.prompt)
    record_end = [match.end() for match in _LINE.finditer(sample.prompt)][-1] + 1
    name, number = str(sample.details["index"]), sample.answers[0]
    question = sample.prompt[record_end:] + sample.answer_prefix
    others = [index for index, (other, _) in enumerate(lines) if other != name]
    asked = generator.choice(others, size=min(queries - 1, len(others)), replace=False).tolist() if others else []
    texts, answers = [sample.prompt[:record_end], question], [(sample.completion, number)]
    for index in asked:
        other, value = lines[index]
        texts.append(question.replace(name, other))
        answers.append((sample.completion.replace(number, value), value))
    return texts, answers


class LongEvalData:
    """A `TrainingData` of LongEval's records."""

    def __init__(self, config: LongEvalConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer

    def row_length(self, *, length: int | None, lines: int | None) -> int:
        """`length`, or what records of so many lines and their questions take, with a little room."""
        if length is not None:
            return length
        assert lines is not None
        queries = min(lines, self._config.queries)
        return math.ceil(self._measured(lines, queries=queries) * _MARGIN)

    def rows(self, *, length: int, lines: int | None, short_share: float, seed: tuple[int, ...]) -> LongEvalRows:
        """Rows of T = `length` tokens, of records of `lines` lines or as many as fit."""
        if lines is None:
            lines = self._lines_within(length)
        rows = LongEvalRows(
            self._config, self._tokenizer, length=length, lines=lines, short_share=short_share, seed=seed
        )
        rows.row(0)
        return rows

    def _measured(self, lines: int, *, queries: int) -> int:
        """The longest of a few rows, in tokens."""
        rows = LongEvalRows(self._config, self._tokenizer, length=None, lines=lines, short_share=0.0, seed=(0,))
        return max(len(rows.ids(index, lines=lines, queries=queries)[0]) for index in range(_MEASURED))

    def _lines_within(self, length: int) -> int:
        """Lines that leave room for their questions, up to `queries`."""
        few, many = 8, 24
        per_line = (self._measured(many, queries=1) - self._measured(few, queries=1)) / (many - few)
        per_question = (self._measured(few, queries=few) - self._measured(few, queries=1)) / (few - 1)
        fixed = self._measured(few, queries=1) - few * per_line
        room = length / _MARGIN - fixed
        # As many questions as lines, where these are fewer than `queries`.
        lines = max(room / (per_line + per_question), (room - self._config.queries * per_question) / per_line)
        if lines < 1:
            raise ValueError(f"rows of {length} tokens have no room for a line and its question; give a longer length")
        return int(lines)


class LongEvalRows:
    """Row i is a pure function of (seed, i): one record, as many questions as fit up to `queries`, and padding.

    A share of the rows is short: its record has log-uniformly many lines from `fewest_lines` to `lines`, and the room
    left is for more questions about it.
    """

    def __init__(
        self,
        config: LongEvalConfig,
        tokenizer: Tokenizer,
        *,
        length: int | None,
        lines: int,
        short_share: float,
        seed: tuple[int, ...],
    ):
        self._config, self._tokenizer, self._length, self._lines = config, tokenizer, length, lines
        self._short = ShortRecords(share=short_share, fewest_lines=config.fewest_lines, lines=lines)
        self._seed, self._words = seed, key_words(config.words)

    def row(self, index: int) -> TokenBatch:
        """Row `index` without a batch axis, in natural order."""
        generator = np.random.default_rng([*self._seed, index, 1])
        lines, queries = self._lines, self._config.queries
        if (fewer := self._short.draw(generator)) is not None:
            lines = queries = fewer
        ids, answer_ids, ends = self.ids(index, lines=lines, queries=queries)
        length, drawn = len(ids) if self._length is None else self._length, 0
        while ends[0] > length:
            if drawn == _REDRAWN:
                raise ValueError(
                    f"a record of {lines} lines and one question take {ends[0]} tokens, the row has {length}; give the "
                    f"stage fewer lines or a longer length"
                )
            drawn += 1
            ids, answer_ids, ends = self.ids(index, lines=lines, queries=queries, drawn=drawn)
        fitting = [end for end in ends if end <= length]
        used = fitting[-1]
        tokens, targets, answers = np.zeros(length, np.int32), *(np.full(length, -1, np.int32) for _ in range(2))
        tokens[:used] = ids[:used]
        targets[: used - 1] = ids[1:used]
        # The target of a place is the token after it.
        answers[: used - 1] = answer_ids[1:used]
        row = TokenBatch(
            tokens=tokens,
            targets=targets,
            weights=(answers >= 0).astype(np.float32),
            positions=np.arange(length, dtype=np.int32),
            segment_ids=None,
            answer_ids=answers,
        )
        return weighted(row, self._config.loss_on)

    def ids(self, index: int, *, lines: int, queries: int, drawn: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids of a record and its questions, which answer each is part of, and where each answer ends.

        The record of `drawn` = 0 is the row's; the further ones are for where that is too long.
        """
        generator = np.random.default_rng([*self._seed, index, *([2, drawn] if drawn else [])])
        sample = draw_lines(
            generator,
            lines=lines,
            index_kind=self._config.index_kind,
            words=self._words,
            answer_start=self._config.answer_start,
        )
        texts, answers = questions_and_answers(sample, generator, queries=queries)
        whole, places = texts[0], []
        for question, (completion, number) in zip(texts[1:], answers, strict=True):
            whole += question
            begin = len(whole) + completion.index(number)
            places.append((begin, begin + len(number)))
            whole += completion
        ids, spans = self._tokenizer.encode_with_spans(whole)
        answer_ids = np.full(len(ids), -1, np.int32)
        # Spans ascend: the tokens of an answer are a stretch.
        first = np.searchsorted(spans[:, 1], [begin for begin, _ in places], side="right")
        last = np.searchsorted(spans[:, 0], [end for _, end in places], side="left")
        for number, (begin, end) in enumerate(zip(first, last, strict=True)):
            answer_ids[begin:end] = number
        ends = last
        if self._config.begin_with_bos and self._tokenizer.bos_id is not None:
            ids = np.concatenate([np.array([self._tokenizer.bos_id], np.int32), ids])
            answer_ids, ends = np.concatenate([np.array([-1], np.int32), answer_ids]), last + 1
        return ids, answer_ids, [int(end) for end in ends]
