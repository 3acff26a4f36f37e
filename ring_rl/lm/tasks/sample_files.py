"""Samples in files, as other people's tools read and write them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ring_rl.atomic_file import atomic_file
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = [
    "LongEvalResponses",
    "check_new",
    "longeval_testcase",
    "needle_record",
    "read_longeval_responses",
    "ruler_record",
    "write_json_lines",
]

_RESPONSE = re.compile(r"Label: (\d+), Predict: (.*), Parsed: (-?\d+), prompt length: -?\d+")
_ACCURACY = re.compile(r"Accuracy: (\S+)")


def check_new(folder: Path, names: Sequence[str]) -> None:
    """Raises FileExistsError if any of these files is in the folder: before work starts, not when it is written."""
    if taken := [name for name in names if (folder / name).exists()]:
        raise FileExistsError(
            f"{folder} holds {', '.join(taken)} already, and nothing is overwritten; choose another output"
        )


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object a line, the whole file or none of it; says how many.

    Raises:
        FileExistsError: there is such a file.
    """
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, overwrite=False) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            count += 1
    return count


def longeval_testcase(sample: Sample) -> dict[str, Any]:
    """A line of LongEval's `testcases/<n>_lines.jsonl`."""
    details = sample.details
    return {
        "random_idx": [details["index"], details["line"]],
        "expected_number": details["number"],
        "num_lines": details["lines"],
        "correct_line": f"line {details['index']}: REGISTER_CONTENT is <{details['number']}>\n",
        "prompt": sample.prompt,
    }


def ruler_record(sample: Sample, *, index: int, room: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A line of RULER's `<task>/validation.jsonl`; `length` counts the tokens of prompt, prefix and answer."""
    return {
        "index": index,
        "input": sample.prompt,
        "outputs": list(sample.answers),
        "length": len(tokenizer.encode(sample.prompt + sample.answer_prefix)) + room,
        "answer_prefix": sample.answer_prefix,
    }


def needle_record(sample: Sample) -> dict[str, Any]:
    """A needle in a haystack; nobody's format, for there is none in common."""
    return {
        "task": sample.task,
        "prompt": sample.prompt,
        "answer_prefix": sample.answer_prefix,
        "answers": list(sample.answers),
        "length": sample.length,
        "depth": sample.depth,
        "details": sample.details,
    }


@dataclasses.dataclass(frozen=True)
class LongEvalResponses:
    """A model's answers as LongEval's `eval.py` writes them.

    Attributes:
        labels: The right numbers.
        outputs: What the model wrote.
        parsed: The number that LongEval read in it, -1 where there was none.
        accuracy: What LongEval says at the end; None where it never got there.
    """

    labels: tuple[int, ...]
    outputs: tuple[str, ...]
    parsed: tuple[int, ...]
    accuracy: float | None


def read_longeval_responses(path: Path) -> LongEvalResponses:
    """Reads a `predictions/<model>/<n>_response.txt`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is of another form, or there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no responses at {path}")
    found, accuracy = [], None
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if match := _RESPONSE.fullmatch(line):
            found.append(match.groups())
        elif match := _ACCURACY.fullmatch(line):
            accuracy = float(match.group(1))
        elif line:
            raise ValueError(f"{path}, line {number}: expected 'Label: ..., Predict: ...', got {line[:60]!r}")
    if not found:
        raise ValueError(f"{path} holds no responses")
    return LongEvalResponses(
        labels=tuple(int(label) for label, _, _ in found),
        outputs=tuple(output for _, output, _ in found),
        parsed=tuple(int(parsed) for _, _, parsed in found),
        accuracy=accuracy,
    )
