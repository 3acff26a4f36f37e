"""Words that name lines: an adjective and a noun, such as "quiet river".

"small" is this project's own choice of 128 plain English words each. "wonderwords" are the lists of that package, from
which LongEval and RULER draw their keys.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources
from typing import Literal

__all__ = ["KeyWords", "WordList", "key_words", "wonderwords_list"]

WordList = Literal["small", "wonderwords"]

_ADJECTIVES = """
    able ancient angry autumn bitter blue bold brave brief bright broad broken busy calm careful cheap cheerful clean
    clear clever cloudy cold complete cool curious daily damp dark dear deep distant double dry dull eager early easy
    elder empty endless even faint fair famous fast final firm flat foreign fresh friendly gentle giant glad golden
    good grand grateful gray great green happy hard heavy high hollow honest huge humble hungry icy idle jolly joyful
    kind large late lazy light little lively lonely long loud lovely loyal lucky mellow mild modern modest narrow near
    neat new noble noisy old open orange pale patient plain polite poor proud public pure quick quiet rapid rare ready
    red rich ripe rough round royal rusty safe secret shy silent silver simple slow small
"""

_NOUNS = """
    anchor apple arrow baker banjo barrel basket beach bell berry bird boat bottle bowl branch bread bridge brother
    bucket butter button cabin camel candle canoe captain carpet castle cat cellar chair cherry church circle city clock
    coast corner cottage cousin curtain daughter desert doctor door dragon drum eagle engine farmer father feather fence
    finger flute forest fountain fox garden gate glove goose guitar hammer harbor hat hill horse house island jacket
    jar judge kettle king kitchen ladder lake lamp leaf lemon letter lion market meadow mirror monkey moon mother
    mountain needle nest nurse oak ocean onion oven owl painter palace parrot path pencil piano pillow planet pocket
    pond potato prince queen rabbit ribbon river road roof saddle school shadow sheep ship shoe
    shovel sister spider spoon stone table
"""


@dataclasses.dataclass(frozen=True)
class KeyWords:
    """Words for keys; a word may be in both."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]

    @property
    def pairs(self) -> int:
        """How many keys there are: an adjective with a noun."""
        return len(self.adjectives) * len(self.nouns)


@functools.cache
def key_words(name: WordList) -> KeyWords:
    """The words of a list.

    Raises:
        ImportError: "wonderwords" is not installed.
    """
    if name == "small":
        return KeyWords(tuple(_ADJECTIVES.split()), tuple(_NOUNS.split()))
    return KeyWords(wonderwords_list("adjective"), wonderwords_list("noun"))


@functools.cache
def wonderwords_list(part_of_speech: Literal["adjective", "noun", "verb"]) -> tuple[str, ...]:
    """A list of wonderwords in its file's order, each word once; the six entries that are two words are left out.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        file = resources.files("wonderwords.assets").joinpath(f"{part_of_speech}list.txt")
        text = file.read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ImportError(
            f"these words come with the package wonderwords: pip install wonderwords, or choose words=small ({error})"
        ) from None
    words = (line.strip() for line in text.splitlines())
    return tuple(dict.fromkeys(word for word in words if word and " " not in word))
