"""What stands around a prompt, and its token ids."""

from __future__ import annotations

import dataclasses

import numpy as np

from ring_rl.lm.tasks.answer_row import answer_row
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.typing import Int32

__all__ = ["Prompter", "TemplateConfig"]

_PLACE = "{prompt}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """What stands around a prompt: nothing for a base model, its chat format for one that was tuned to chat.

    Attributes:
        text: Holds `{prompt}` once.
        begin_with_bos: Whether the tokenizer's token for the beginning of a text goes before it, if it has one.
    """

    text: str
    begin_with_bos: bool

    def __post_init__(self) -> None:
        if self.text.count(_PLACE) != 1:
            raise ValueError(f"a template holds {_PLACE} once, got {self.text!r}")

    def framed(self, text: str) -> str:
        """The template's text around another."""
        before, after = self.text.split(_PLACE)
        return before + text + after

    def around(self, sample: Sample) -> Sample:
        """The sample with the template's text around its prompt; a completion begins with one blank at most."""
        prompt = self.framed(sample.prompt)
        blank_before = (prompt + sample.answer_prefix)[-1:].isspace()
        completion = sample.completion.removeprefix(" ") if blank_before else sample.completion
        return dataclasses.replace(sample, prompt=prompt, completion=completion)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompter:
    """A tokenizer and a template: from samples to what a model reads."""

    tokenizer: Tokenizer
    template: TemplateConfig

    @property
    def template_tokens(self) -> int:
        """About how many tokens the template takes; a tokenizer may join letters across its seams."""
        before, after = self.template.text.split(_PLACE)
        begin = self.template.begin_with_bos and self.tokenizer.bos_id is not None
        return len(self.tokenizer.encode(before)) + len(self.tokenizer.encode(after)) + begin

    def prompt(self, sample: Sample) -> Int32[np.ndarray, " T"]:
        """The ids after which a model is to go on."""
        framed = self.template.around(sample)
        return self.ids(framed.prompt + framed.answer_prefix)

    def ids(self, text: str) -> Int32[np.ndarray, " T"]:
        """Those of a text that stands in the template already, with the beginning that it asks for."""
        ids = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_id if self.template.begin_with_bos else None
        return np.concatenate([np.array([] if bos is None else [bos], np.int32), np.asarray(ids, np.int32)])

    def answered(self, sample: Sample) -> TokenBatch:
        """A row [T] that holds the right answer."""
        return answer_row(
            self.template.around(sample),
            self.tokenizer,
            begin_with_bos=self.template.begin_with_bos,
            end_with_eos=False,
        )
