"""What an answer is worth, by each benchmark's own rule.

The rules differ where it matters: LongEval reads the last integer and nothing else, LWM and RULER look for the answer
anywhere in the text (so an answer inside a longer number counts), EasyContext asks for every token of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ring_rl.lm.tasks.sample import Sample
from ring_rl.typing import Bool, Int

__all__ = [
    "SCORERS",
    "Scorer",
    "answer_hits",
    "first_digits",
    "last_integer",
    "needle_hits",
    "score",
    "substring_any",
    "substring_fraction",
]

# The generated text and the answers, to a score in [0, 1].
Scorer = Callable[[str, Sequence[str]], float]


def last_integer(output: str) -> int:
    """The last run of digits as a number, or -1 where there is none (LongEval, `test_lines_one_sample`).

    A sign or a point separates: "-7" is 7 and "3.50" is 50.
    """
    runs = re.findall(r"\d+", output)
    return int(runs[-1]) if runs else -1


def _last_integer_is(output: str, answers: Sequence[str]) -> float:
    (expected,) = answers
    return float(last_integer(output) == int(expected))


def first_digits(output: str, answers: Sequence[str]) -> float:
    """Whether the output begins with the answer's digits, of which each is a word (compact lines)."""
    (expected,) = answers
    wanted = expected.split()
    return float(output.split()[: len(wanted)] == wanted)


def needle_hits(output: str, answers: Sequence[str]) -> tuple[bool, ...]:
    """For each answer, whether it stands somewhere in the output, letter for letter (LWM)."""
    return tuple(answer in output for answer in answers)


def _share_of_needles(output: str, answers: Sequence[str]) -> float:
    return float(np.mean(needle_hits(output, answers)))


def substring_fraction(output: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand somewhere in the output, in any case (RULER, `string_match_all`)."""
    lowered = output.lower()
    return float(np.mean([answer.lower() in lowered for answer in answers]))


def substring_any(output: str, answers: Sequence[str]) -> float:
    """Whether any of the answers stands in the output, in any case (RULER, `string_match_part`: its QA tasks)."""
    lowered = output.lower()
    return float(any(answer.lower() in lowered for answer in answers))


def answer_hits(
    most_likely: Int[np.ndarray, " T"], targets: Int[np.ndarray, " T"], answer_ids: Int[np.ndarray, " T"]
) -> Bool[np.ndarray, " Q"]:
    """Teacher forcing: for each answer, whether every one of its tokens was the most likely one (EasyContext).

    Args:
        most_likely: The model's choice at each place, after all that stands before it, the answer's earlier tokens too.
        targets: What follows there.
        answer_ids: Which answer a target belongs to, -1 for none; every answer from 0 on has a target.

    Raises:
        ValueError: an answer has no target.
    """
    of_answer = answer_ids >= 0
    count = int(answer_ids.max(initial=-1)) + 1
    sizes = np.bincount(answer_ids[of_answer], minlength=count)
    if not sizes.all():
        raise ValueError(f"answer {int(np.argmin(sizes))} has no token; it was cut off")
    hits = np.bincount(answer_ids[of_answer & (most_likely == targets)], minlength=count)
    return hits == sizes


SCORERS: Mapping[str, Scorer] = {
    "line_retrieval": _last_integer_is,
    "compact_lines": first_digits,
    "needle": _share_of_needles,
    "multi_needle": _share_of_needles,
    "niah_single_1": substring_fraction,
    "niah_multikey_2": substring_fraction,
    "niah_multikey_3": substring_fraction,
    "vt": substring_fraction,
    "cwe": substring_fraction,
    "fwe": substring_fraction,
}


def score(sample: Sample, output: str) -> float:
    """The output's worth by the rule of the sample's task.

    Raises:
        ValueError: the task has no rule.
    """
    if sample.task not in SCORERS:
        raise ValueError(f"there is no scorer of the task {sample.task!r}; there are {', '.join(SCORERS)}")
    return SCORERS[sample.task](output, sample.answers)
