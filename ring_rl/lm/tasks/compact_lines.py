"""Line retrieval in nine tokens a line: the form in which small models learn it from scratch.

    LINE quiet river IS 4 0 7 1 9
    LINE brave candle IS 2 2 8 0 5
    ...
    ASK brave candle IS 2 2 8 0 5

A record of lines, then questions; every word and every digit is one token of a `WordTokenizer`, newlines are none.
Keys are different pairs of words in every record, values are five random digits, leading zeros among them. This is
LongEval's task (`line_retrieval.py`) without its English: much cheaper, and not to be compared with figures of models
that read the text.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ring_rl.lm.key_words import KeyWords
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.lm.tokenizer.compact_tokenizer import ASK, FIRST_DIGIT, IS, LINE, compact_tokenizer
from ring_rl.typing import Int

__all__ = ["TASK", "TOKENS_PER_LINE", "CompactLines", "CompactRecord", "lines_within"]

TASK = "compact_lines"
VALUE_DIGITS = 5
# LINE adjective noun IS, and the digits.
TOKENS_PER_LINE = 4 + VALUE_DIGITS


def lines_within(tokens: int, *, queries: int) -> int:
    """How many lines, with so many questions after them, fill at most `tokens` tokens.

    Raises:
        ValueError: not even one line fits.
    """
    lines = tokens // TOKENS_PER_LINE - queries
    if lines < 1:
        raise ValueError(
            f"{tokens} tokens hold no line besides {queries} questions of {TOKENS_PER_LINE} tokens; ask for at least "
            f"{TOKENS_PER_LINE * (queries + 1)} tokens"
        )
    return lines


@dataclasses.dataclass(frozen=True, eq=False)
class CompactRecord:
    """n lines and Q questions about them, as indices.

    Attributes:
        adjectives: Of each line, into the list of adjectives.
        nouns: Of each line.
        digits: Of each line's value.
        asked: Which lines the questions are about, in the order of the questions.
    """

    adjectives: Int[np.ndarray, " n"]
    nouns: Int[np.ndarray, " n"]
    digits: Int[np.ndarray, "n 5"]
    asked: Int[np.ndarray, " Q"]


class CompactLines:
    """Draws records, and writes them as rows of tokens or as text.

    Args:
        words: Of which keys are made.
    """

    def __init__(self, words: KeyWords):
        self.words = words
        self.tokenizer = compact_tokenizer(words)
        ids = {word: index for index, word in enumerate(self.tokenizer.words)}
        self._adjective_ids = np.array([ids[word] for word in words.adjectives], np.int32)
        self._noun_ids = np.array([ids[word] for word in words.nouns], np.int32)

    def draw(
        self, generator: np.random.Generator, *, lines: int, queries: int, depth: float | None = None
    ) -> CompactRecord:
        """A record with fresh keys and values, and questions about different lines of it.

        Args:
            generator: Of all that is random.
            lines: In the record.
            queries: Questions after it.
            depth: With one question: which line it is about, 0 the first and 1 the last; None draws it.

        Raises:
            ValueError: more lines than keys, or more questions than lines.
        """
        if not 1 <= lines <= self.words.pairs:
            raise ValueError(
                f"these words name between 1 and {self.words.pairs} lines, got {lines}; words=wonderwords has more"
            )
        if not 1 <= queries <= lines:
            raise ValueError(f"a record of {lines} lines answers between 1 and {lines} questions, got {queries}")
        if depth is not None and (queries != 1 or not 0 <= depth <= 1):
            raise ValueError(f"a depth in [0, 1] goes with one question, got depth {depth} and {queries} questions")
        pairs = generator.choice(self.words.pairs, size=lines, replace=False)
        if depth is None:
            asked = generator.choice(lines, size=queries, replace=False)
        else:
            asked = np.array([round(depth * (lines - 1))])
        return CompactRecord(
            adjectives=pairs // len(self.words.nouns),
            nouns=pairs % len(self.words.nouns),
            digits=generator.integers(0, 10, size=(lines, VALUE_DIGITS)),
            asked=asked,
        )

    def row(self, record: CompactRecord, *, length: int | None = None) -> TokenBatch:
        """The record as tokens [T]; only the digits after questions have weight, and are answers 0 to Q - 1.

        Args:
            record: As drawn.
            length: T, filled up on the right; None: as long as it is.

        Raises:
            ValueError: the record is longer than `length`.
        """
        lines, queries = len(record.adjectives), len(record.asked)
        used = TOKENS_PER_LINE * (lines + queries)
        length = used if length is None else length
        if used > length:
            raise ValueError(
                f"{lines} lines and {queries} questions take {used} tokens, the row has {length}; "
                f"at most {max(length // TOKENS_PER_LINE - queries, 0)} lines fit"
            )
        order = np.concatenate([np.arange(lines), record.asked])
        block = np.empty((lines + queries, TOKENS_PER_LINE), np.int32)
        block[:lines, 0], block[lines:, 0] = LINE, ASK
        block[:, 1] = self._adjective_ids[record.adjectives[order]]
        block[:, 2] = self._noun_ids[record.nouns[order]]
        block[:, 3] = IS
        block[:, 4:] = record.digits[order] + FIRST_DIGIT
        tokens = np.zeros(length, np.int32)
        tokens[:used] = block.reshape(-1)
        targets = np.full(length, -1, np.int32)
        targets[: used - 1] = tokens[1:used]
        # A digit is the target of the token before it: IS and the first four digits.
        answer_ids = np.full((length + TOKENS_PER_LINE - 1) // TOKENS_PER_LINE * TOKENS_PER_LINE, -1, np.int32)
        of_question = answer_ids.reshape(-1, TOKENS_PER_LINE)[lines : lines + queries]
        of_question[:, 3 : 3 + VALUE_DIGITS] = np.arange(queries)[:, None]
        answer_ids = answer_ids[:length]
        return TokenBatch(
            tokens=tokens,
            targets=targets,
            weights=(answer_ids >= 0).astype(np.float32),
            positions=np.arange(length, dtype=np.int32),
            segment_ids=None,
            answer_ids=answer_ids,
        )

    def sample(self, record: CompactRecord) -> Sample:
        """A record with one question, as text.

        Raises:
            ValueError: it has several.
        """
        if len(record.asked) != 1:
            raise ValueError(f"a sample asks one question, the record has {len(record.asked)}")
        lines, asked = len(record.adjectives), int(record.asked[0])
        keys = [
            f"{self.words.adjectives[adjective]} {self.words.nouns[noun]}"
            for adjective, noun in zip(record.adjectives, record.nouns, strict=True)
        ]
        values = [" ".join(map(str, digits)) for digits in record.digits]
        text = "".join(f"LINE {key} IS {value}\n" for key, value in zip(keys, values, strict=True))
        return Sample(
            task=TASK,
            prompt=f"{text}ASK {keys[asked]}",
            answer_prefix=" IS",
            completion=f" {values[asked]}",
            answers=(values[asked],),
            length=lines,
            depth=asked / max(lines - 1, 1),
            details={"key": keys[asked], "line": asked, "lines": lines},
        )
