"""Needles in a haystack: numbers of cities, hidden in a long text, one asked for or several.

The wording is the benchmarks', word for word: EasyContext (jzhang38/EasyContext at 6b0d310, eval_needle.py) and LWM
(LargeWorldModel/LWM at f45d2b7, scripts/eval_needle.py and eval_needle_multi.py), both Apache-2.0. What differs: a
number always has seven digits and no leading zero; a city has one number; the text is shortened for the needle, never
the needle; several needles are put in at once; excerpts begin at a random sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from ring_rl.lm.tasks.haystack import Haystack, insert_all, place_after, place_before
from ring_rl.lm.tasks.sample import Sample

__all__ = ["CITIES", "MULTI_TASK", "SINGLE_TASK", "NeedleStyle", "draw_needle", "draw_needles"]

SINGLE_TASK = "needle"
MULTI_TASK = "multi_needle"
NeedleStyle = Literal["easycontext", "lwm"]

_PHRASE = "The special magic"
_EASYCONTEXT_CITY = "Singapore"
_EASYCONTEXT_DISTRACTORS = ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")
# LWM's cities, each once: its list names many of them two or three times, and two draws of one city lose a needle.
# fmt: off
CITIES = (
    "Chicago", "Yangon", "Antananarivo", "Colombo", "Almaty", "Sydney", "Mexico City", "Seattle", "Lagos",
    "Amsterdam", "Belgrade", "Cairo", "Baghdad", "Damascus", "Kigali", "Dakar", "Sofia", "Victoria", "Tashkent",
    "Mumbai", "Barcelona", "Amman", "Toronto", "Bratislava", "Johannesburg", "Thimphu", "Bangkok", "Santiago",
    "San Francisco", "Paris", "Rabat", "Copenhagen", "Madrid", "Ho Chi Minh City", "Sarajevo", "Delhi", "Istanbul",
    "Khartoum", "Helsinki", "Doha", "Kuala Lumpur", "Budapest", "Shanghai", "Moscow", "Los Angeles", "Oslo",
    "Berlin", "Bangalore", "Tokyo", "Melbourne", "Port Louis", "Lisbon", "Nairobi", "Kampala", "Lima", "Maputo",
    "Vancouver", "Dubai", "Jakarta", "Yerevan", "Beirut", "Athens", "Bucharest", "Brussels", "Tunis", "Astana",
    "Seoul", "Buenos Aires", "Vienna",
)
# fmt: on
# Of the places in the text that several needles are drawn from, as in LWM's script.
_DEPTHS = 20


@dataclasses.dataclass(frozen=True)
class _Wording:
    """What stands around the text; `needle` and `question` hold {city}."""

    before: str
    needle: str
    after: str
    answer_prefix: str
    blank: str
    place: Callable[[str, float], int]


_STYLES: dict[NeedleStyle, _Wording] = {
    "easycontext": _Wording(
        before="This is a very long story book: <book>",
        needle="\nThe special magic {city} number is: {number}.\n",
        after="</book>.\n Based on the content of the book, Question: What is the special magic {city} number? Answer:",
        answer_prefix=" The special magic {city} number is:",
        blank=" ",
        place=place_after,
    ),
    "lwm": _Wording(
        before="You are a helpful assistant. USER: ",
        needle="\nThe special magic {city} number is: {number}\n",
        after=" What is the special magic {city} number? Don't give information outside the document or repeat your "
        "findings. Keep your response short and direct. ASSISTANT: ",
        answer_prefix="",
        blank="",
        place=place_before,
    ),
}


def draw_needle(
    generator: np.random.Generator,
    *,
    haystack: Haystack,
    length: int,
    room: int,
    style: NeedleStyle,
    depth: float,
    distractors: int,
) -> Sample:
    """One needle.

    Args:
        generator: Of all that is random.
        haystack: Where it is hidden.
        length: Tokens of prompt, answer prefix and `room` together, at most; a few fewer where sentences end.
        room: Tokens kept free for a template and the answer.
        style: Whose wording. "easycontext" gives the beginning of the answer, which a base model completes.
        depth: Share of the text before the needle, moved to the end of a sentence.
        distractors: Numbers of other cities hidden at random places (0 to 6, "easycontext").

    Raises:
        ValueError: the length holds no text, or there are too many distractors, or none in this style.
    """
    wording = _STYLES[style]
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    most = len(_EASYCONTEXT_DISTRACTORS) if style == "easycontext" else 0
    if not 0 <= distractors <= most:
        raise ValueError(f"the style {style} has between 0 and {most} distractors, got {distractors}")
    city = _EASYCONTEXT_CITY if style == "easycontext" else CITIES[int(generator.integers(len(CITIES)))]
    numbers = _numbers(generator, 1 + distractors)
    needles = [
        wording.needle.format(city=each, number=number)
        for each, number in zip((city, *_EASYCONTEXT_DISTRACTORS[:distractors]), numbers, strict=True)
    ]
    depths = [depth, *generator.random(distractors).tolist()]
    after, prefix = wording.after.format(city=city), wording.answer_prefix.format(city=city)
    filled = _fill(
        generator, haystack, needles, depths, wording.place, before=wording.before, after=after, prefix=prefix,
        tokens=length - room,
    )  # fmt: skip
    return Sample(
        task=SINGLE_TASK,
        prompt=filled.prompt,
        answer_prefix=prefix,
        completion=wording.blank + numbers[0],
        answers=(numbers[0],),
        length=length,
        depth=filled.depths[0],
        details={"style": style, "city": city, "asked_depth": depth, "distractors": distractors},
    )


def draw_needles(
    generator: np.random.Generator, *, haystack: Haystack, length: int, room: int, needles: int, retrieved: int
) -> Sample:
    """N needles at different depths, R of which are asked for (LWM).

    Args:
        generator: Of all that is random.
        haystack: Where they are hidden.
        length: As `draw_needle`'s.
        room: As `draw_needle`'s.
        needles: N.
        retrieved: R.

    Raises:
        ValueError: the length holds no text, or the numbers of needles make no sense.
    """
    if not 1 <= retrieved <= needles <= len(CITIES):
        raise ValueError(
            f"of needles, between 1 and {len(CITIES)}, at least one and at most all are retrieved; "
            f"got {needles} needles and {retrieved} retrieved"
        )
    cities = [CITIES[index] for index in generator.choice(len(CITIES), size=needles, replace=False)]
    numbers = _numbers(generator, needles)
    depths = generator.choice(np.linspace(0, 1, max(_DEPTHS, needles)), size=needles, replace=False).tolist()
    asked = generator.choice(needles, size=retrieved, replace=False).tolist()
    names = [cities[index] for index in asked]
    answers = tuple(numbers[index] for index in asked)
    if retrieved == 1:
        question = f"What is the special magic number for {names[0]}?"
    else:
        question = f"What are the special magic numbers for {', '.join(names[:-1])}, and {names[-1]}?"
    wording = _STYLES["lwm"]
    filled = _fill(
        generator,
        haystack,
        [wording.needle.format(city=city, number=number) for city, number in zip(cities, numbers, strict=True)],
        depths,
        wording.place,
        before=wording.before,
        after=f" {question} Don't give information outside the document. ASSISTANT: ",
        prefix="",
        tokens=length - room,
    )
    return Sample(
        task=MULTI_TASK,
        prompt=filled.prompt,
        answer_prefix="",
        completion=", ".join(answers),
        answers=answers,
        length=length,
        depth=None,
        details={
            "cities": cities,
            "numbers": numbers,
            "depths": filled.depths,
            "asked": names,
            "needles": needles,
            "retrieved": retrieved,
        },
    )


def _numbers(generator: np.random.Generator, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(10**6 + offset) for offset in generator.choice(9 * 10**6, size=count, replace=False).tolist()]


@dataclasses.dataclass(frozen=True)
class _Filled:
    prompt: str
    depths: list[float]


def _fill(
    generator: np.random.Generator,
    haystack: Haystack,
    needles: list[str],
    depths: list[float],
    place: Callable[[str, float], int],
    *,
    before: str,
    after: str,
    prefix: str,
    tokens: int,
) -> _Filled:
    """As much of the haystack as fits into `tokens` with the needles in it and the rest around it."""
    haystack.require_absent(_PHRASE)
    count = lambda text: len(haystack.tokenizer.encode(text))  # noqa: E731
    fixed = count(before + "".join(needles) + after + prefix)
    start = haystack.draw_start(generator)
    # Joined texts may take some tokens more or fewer than their parts.
    wanted = tokens - fixed
    while wanted > 0:
        text = haystack.excerpt(start, wanted)
        places = [place(text, depth) for depth in depths]
        prompt = before + insert_all(text, list(zip(places, needles, strict=True))) + after
        excess = count(prompt + prefix) - tokens
        if excess <= 0:
            return _Filled(prompt, [where / len(text) for where in places])
        wanted -= excess
    raise ValueError(
        f"{tokens} tokens hold no text besides {len(needles)} needles and the question, which take {fixed}; "
        "ask for a greater length"
    )
