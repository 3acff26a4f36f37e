"""Six of RULER's tasks: those that need no text from elsewhere.

Templates, parameters and the way contexts are made are RULER's (NVIDIA/RULER, scripts/data/synthetic and
scripts/synthetic.yaml, Apache-2.0; arXiv:2404.06654), the templates word for word. What differs: keys, values and
names never repeat within a context, so no question has two answers.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from scipy.special import zeta

from ring_rl.lm.key_words import key_words, wonderwords_list

__all__ = ["RULER_TASKS", "RulerDraft", "RulerTask", "RulerTaskName"]

RulerTaskName = Literal["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class RulerDraft:
    """A sample's text; the fields are those of `Sample`."""

    prompt: str
    answer_prefix: str
    completion: str
    answers: tuple[str, ...]
    depth: float | None
    details: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RulerTask:
    """A task whose context grows with a size.

    Attributes:
        name: RULER's.
        tokens_to_generate: What RULER keeps free for the answer.
        smallest: Size below which there is no such task.
        largest: Size at which words run out; None for no such size. Needs wonderwords where the task does.
        draw: Makes a text from a generator, a size, the length (some parameters depend on it), and the depth of the
            answer (None draws it), for tasks that have one.
    """

    name: RulerTaskName
    tokens_to_generate: int
    smallest: int
    largest: Callable[[], int | None]
    draw: Callable[[np.random.Generator, int, int, float | None], RulerDraft]


def _unlimited() -> int | None:
    return None


# --- needles ---------------------------------------------------------------------------------------------------------


def _numbers(generator: np.random.Generator, count: int) -> list[str]:
    return [str(10**6 + offset) for offset in generator.choice(9 * 10**6, size=count, replace=False).tolist()]


def _word_pairs(generator: np.random.Generator, count: int) -> list[str]:
    words = key_words("wonderwords")
    pairs = generator.choice(words.pairs, size=count, replace=False)
    return [f"{words.adjectives[pair // len(words.nouns)]}-{words.nouns[pair % len(words.nouns)]}" for pair in pairs]


def _uuids(generator: np.random.Generator, count: int) -> list[str]:
    return [str(uuid.UUID(bytes=generator.bytes(16), version=4)) for _ in range(count)]


_DRAW = {"numbers": _numbers, "words": _word_pairs, "uuids": _uuids}


def _needle_task(
    generator: np.random.Generator,
    size: int,
    depth: float | None,
    *,
    haystack: Literal["noise", "needles"],
    keys: str,
    values: str,
) -> RulerDraft:
    """One needle among `size` sentences: always the same ones, or needles of other keys."""
    count = 1 + (size if haystack == "needles" else 0)
    all_keys, all_values = _DRAW[keys](generator, count), _DRAW[values](generator, count)
    needles = [
        f"One of the special magic {values} for {key} is: {value}."
        for key, value in zip(all_keys, all_values, strict=True)
    ]
    sentences = needles[1:] if haystack == "needles" else [_NOISE] * size
    place = int(generator.integers(size)) if depth is None else round(depth * size)
    sentences.insert(place, needles[0])
    key, value, kind = all_keys[0], all_values[0], values[:-1]
    context = "\n".join(sentences)
    return RulerDraft(
        prompt=(
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the "
            "provided text?"
        ),
        answer_prefix=f" The special magic {kind} for {key} mentioned in the provided text is",
        completion=f" {value}",
        answers=(value,),
        depth=place / size,
        details={"key": key, "sentences": size},
    )


def _single_1(generator: np.random.Generator, size: int, length: int, depth: float | None) -> RulerDraft:
    return _needle_task(generator, size, depth, haystack="noise", keys="words", values="numbers")


def _multikey_2(generator: np.random.Generator, size: int, length: int, depth: float | None) -> RulerDraft:
    return _needle_task(generator, size, depth, haystack="needles", keys="words", values="numbers")


def _multikey_3(generator: np.random.Generator, size: int, length: int, depth: float | None) -> RulerDraft:
    return _needle_task(generator, size, depth, haystack="needles", keys="uuids", values="uuids")


# --- variable tracking -----------------------------------------------------------------------------------------------

_HOPS = 4
# RULER fits the worked example into 500 tokens; with 25 tokens a sentence, as BPE tokenizers have it, these fit.
_EXAMPLE_NOISE = 14


def _variables(generator: np.random.Generator, count: int, letters: int) -> list[str]:
    numbers = generator.choice(26**letters, size=count, replace=False).tolist()
    return ["".join(_LETTERS[number // 26**place % 26] for place in reversed(range(letters))) for number in numbers]


def _tracking_text(generator: np.random.Generator, size: int, letters: int) -> tuple[str, str, list[str]]:
    names = _variables(generator, _HOPS + 1, letters)
    value = str(generator.integers(10000, 99999))
    # The blank at the end of every copy is in RULER, too.
    chain = [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names)),
    ]
    sentences = [_NOISE] * size
    places = np.sort(generator.choice(size, size=len(chain), replace=False)).tolist()
    for shift, (place, statement) in enumerate(zip(places, chain, strict=True)):
        sentences.insert(place + shift, statement)
    context = "\n".join(sentences).replace(". \n", ".\n")
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    # The slip of the pen is RULER's, too.
    prefix = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assgined the value {value}, they are: "
    )
    return prompt, prefix, names


def _variable_tracking(generator: np.random.Generator, size: int, length: int, depth: float | None) -> RulerDraft:
    example, example_prefix, example_names = _tracking_text(generator, _EXAMPLE_NOISE, letters=3)
    prompt, prefix, names = _tracking_text(generator, size, letters=5)
    return RulerDraft(
        prompt=f"{example}{example_prefix} {' '.join(example_names)}\n\n{prompt}",
        answer_prefix=prefix,
        completion=f" {' '.join(names)}",
        answers=tuple(names),
        depth=None,
        details={"sentences": size, "hops": _HOPS},
    )


# --- common and frequent words ---------------------------------------------------------------------------------------

_COMMON = 10
_FREQUENT_ROOM = 50


def _plain_words() -> list[str]:
    words = (*wonderwords_list("noun"), *wonderwords_list("adjective"), *wonderwords_list("verb"))
    return sorted(set(words))


def _listed(generator: np.random.Generator, size: int, common: int, uncommon: int) -> tuple[str, str, list[str]]:
    """A list in which 10 words of `size` stand `common` times and the others `uncommon` times; its answer."""
    words = _plain_words()
    drawn = [words[index] for index in generator.choice(len(words), size=size, replace=False)]
    entries = drawn[:_COMMON] * common + drawn[_COMMON:] * uncommon
    order = generator.permutation(len(entries))
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered([entries[index] for index in order])}\n"
        "Question: What are the 10 most common words in the above list?"
    )
    return prompt, " Answer: The top 10 words that appear most often in the list are:", drawn[:_COMMON]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _common_words(generator: np.random.Generator, size: int, length: int, depth: float | None) -> RulerDraft:
    # Below 4K tokens RULER's counts leave no room for other words.
    of_example, of_list = ((20, 3, 1), (6, 1)) if length < 4096 else ((40, 10, 3), (30, 3))
    example, example_prefix, example_answers = _listed(generator, *of_example)
    prompt, prefix, answers = _listed(generator, size, *of_list)
    return RulerDraft(
        prompt=f"{example}{example_prefix} {_numbered(example_answers)}\n{prompt}",
        answer_prefix=prefix,
        completion=f" {_numbered(answers)}",
        answers=tuple(answers),
        depth=None,
        details={"words": size},
    )


def _frequent_words(generator: np.random.Generator, size: int, length: int, depth: float | None) -> RulerDraft:
    """Coded words whose counts fall as rank^-2; the most frequent is noise, the next three are asked for."""
    alpha, letters = 2.0, 6
    vocabulary = max((length - _FREQUENT_ROOM) // 50, 5)
    names = [name.lower() for name in _variables(generator, vocabulary, letters)]
    names[0] = "..."
    ranks = np.arange(1, vocabulary + 1)
    counts = (size * ranks**-alpha / zeta(alpha)).astype(int)
    coded = np.repeat(np.arange(vocabulary), counts)
    text = " ".join(names[index] for index in generator.permutation(coded))
    return RulerDraft(
        prompt=(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {text}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?"
        ),
        answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
        completion=f" {' '.join(names[1:4])}",
        answers=tuple(names[1:4]),
        depth=None,
        details={"words": int(counts.sum()), "vocabulary": vocabulary},
    )


RULER_TASKS: dict[RulerTaskName, RulerTask] = {
    task.name: task
    for task in (
        RulerTask("niah_single_1", 128, 1, _unlimited, _single_1),
        RulerTask("niah_multikey_2", 128, 1, lambda: key_words("wonderwords").pairs - 1, _multikey_2),
        RulerTask("niah_multikey_3", 128, 1, _unlimited, _multikey_3),
        RulerTask("vt", 30, _HOPS + 1, _unlimited, _variable_tracking),
        RulerTask("cwe", 120, _COMMON + 1, lambda: len(_plain_words()), _common_words),
        # With fewer, the last word asked for might be as frequent as the next: 80 / zeta(2) is 48, its 16th part 3, its
        # 25th 1.
        RulerTask("fwe", _FREQUENT_ROOM, 80, _unlimited, _frequent_words),
    )
}
