"""Line retrieval as LongEval asks it (the task of the Ring Attention paper's figure 3).

A record of lines, each with a name and a number, then a question about one of them. Header, lines and question are
LongEval's, word for word (DachengLi1/LongChat at 4b5faa5, longeval/utils.py, Apache-2.0): figures are comparable only
then. What differs: names are drawn without repetition, also where there are more lines than adjectives.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from typing import Literal

import numpy as np

from ring_rl.lm.key_words import KeyWords
from ring_rl.lm.tasks.sample import Sample

__all__ = ["TASK", "AnswerStart", "IndexKind", "draw_lines"]

TASK = "line_retrieval"
# LongEval's LRT-NL, LRT, LRT-ABCindex and LRT-UUID.
IndexKind = Literal["words", "number", "letters", "uuid"]
# How the answer begins that the model completes: nothing (chat models), as in LongEval for a base model, as a line.
AnswerStart = Literal["none", "longeval_base", "line"]

SMALLEST, LARGEST = 1, 50_000

_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains "
    "a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
_LINE = "line {index}: REGISTER_CONTENT is <{number}>\n"
_QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {index}? I need the number."


def draw_lines(
    generator: np.random.Generator,
    *,
    lines: int,
    index_kind: IndexKind,
    words: KeyWords,
    answer_start: AnswerStart,
    depth: float | None = None,
) -> Sample:
    """A record of lines and the question about one.

    Args:
        generator: Of all that is random.
        lines: In the record.
        index_kind: What names a line.
        words: Where names are words.
        answer_start: What is given of the answer.
        depth: Which line is asked for, 0 the first and 1 the last; None draws it uniformly, as LongEval does.

    Raises:
        ValueError: there are fewer names than lines, or the depth is not in [0, 1].
    """
    if lines < 1:
        raise ValueError(f"a record has at least one line, got {lines}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    names = _NAMES[index_kind](generator, lines, words)
    numbers = generator.integers(SMALLEST, LARGEST + 1, size=lines).tolist()
    asked = int(generator.integers(lines)) if depth is None else round(depth * (lines - 1))
    name, number = names[asked], str(numbers[asked])
    record = "".join(_LINE.format(index=index, number=value) for index, value in zip(names, numbers, strict=True))
    prefix, completion = _answer(answer_start, name, number)
    return Sample(
        task=TASK,
        prompt=_HEADER + record + _QUESTION.format(index=name),
        answer_prefix=prefix,
        completion=completion,
        answers=(number,),
        length=lines,
        depth=asked / max(lines - 1, 1),
        details={"index": name, "line": asked, "lines": lines, "number": int(number)},
    )


def _answer(start: AnswerStart, name: str, number: str) -> tuple[str, str]:
    match start:
        case "none":
            return "", f" {number}"
        case "longeval_base":
            return f"Line <{name}>: <REGISTER_CONTENT> is", f" {number}"
        case "line":
            return f"\nline {name}: REGISTER_CONTENT is", f" <{number}>"


def _word_names(generator: np.random.Generator, lines: int, words: KeyWords) -> list[str]:
    """Pairs, each adjective and each noun in one of them as in LongEval; with more lines than words, any pairs."""
    if lines > words.pairs:
        raise ValueError(f"these words name {words.pairs} lines, got {lines}; words=wonderwords has more")
    if lines <= min(len(words.adjectives), len(words.nouns)):
        adjectives = generator.choice(len(words.adjectives), size=lines, replace=False)
        nouns = generator.choice(len(words.nouns), size=lines, replace=False)
    else:
        pairs = generator.choice(words.pairs, size=lines, replace=False)
        adjectives, nouns = pairs // len(words.nouns), pairs % len(words.nouns)
    return [f"{words.adjectives[i]}-{words.nouns[j]}" for i, j in zip(adjectives, nouns, strict=True)]


def _number_names(generator: np.random.Generator, lines: int, words: KeyWords) -> list[str]:
    return [str(number) for number in range(1, lines + 1)]


def _letter_names(generator: np.random.Generator, lines: int, words: KeyWords) -> list[str]:
    """The first strings of A to F in order, six letters long and longer where 6^6 are too few."""
    length = 6
    while 6**length < lines:
        length += 1
    return ["".join(letters) for letters in itertools.islice(itertools.product("ABCDEF", repeat=length), lines)]


def _uuid_names(generator: np.random.Generator, lines: int, words: KeyWords) -> list[str]:
    return [str(uuid.UUID(bytes=generator.bytes(16), version=4)) for _ in range(lines)]


_NAMES: dict[IndexKind, Callable[[np.random.Generator, int, KeyWords], list[str]]] = {
    "words": _word_names,
    "number": _number_names,
    "letters": _letter_names,
    "uuid": _uuid_names,
}
