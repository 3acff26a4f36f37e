"""Writes needles in a haystack: one JSON object a line, one file a length.

    python datasets/needle/generate.py lengths=[4096,8192] output=datasets/needle/data
    python datasets/needle/generate.py needles=4 retrieved=2 style=lwm output=datasets/needle/data_multi

Settings: conf/generate_needle.yaml.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.tasks.haystack import Haystack, python_reference, read_haystack
from ring_rl.lm.tasks.needle import NeedleStyle, draw_needle, draw_needles
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tasks.sample_files import check_new, needle_record, write_json_lines
from ring_rl.lm.tokenizer.load import TokenizerConfig, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which needles go where."""

    tokenizer: TokenizerConfig
    haystack: Path | None
    lengths: tuple[int, ...]
    room: int
    samples: int
    style: NeedleStyle
    depths: tuple[float, ...]
    distractors: int
    needles: int
    retrieved: int
    seed: int
    output: Path

    def __post_init__(self) -> None:
        if not self.lengths or self.samples < 1 or not self.depths:
            raise ValueError("lengths and depths name at least one each, and samples is at least 1")
        if self.needles > 1 and self.style != "lwm":
            raise ValueError(f"several needles are LWM's: set style=lwm, got style={self.style}")
        if self.needles > 1 and self.distractors:
            raise ValueError(
                f"distractors={self.distractors} go with one needle: set distractors=0, or retrieve fewer needles than "
                "are hidden"
            )
        if not 1 <= self.retrieved <= self.needles:
            raise ValueError(
                f"between one and all of the needles are retrieved, got retrieved={self.retrieved} of "
                f"needles={self.needles}"
            )


def generate(config: GenerateConfig) -> None:
    """Writes and says what was written."""
    console = Console(stderr=True)
    names = {length: f"{length}_tokens.jsonl" for length in config.lengths}
    check_new(config.output, list(names.values()))
    text = python_reference() if config.haystack is None else read_haystack(config.haystack)
    haystack = Haystack(text, load_tokenizer(config.tokenizer))
    # What cannot be drawn, such as a length that is too short, is known before anything is written.
    for depth in config.depths if config.needles == 1 else (None,):
        _sample(config, haystack, min(config.lengths), depth, np.random.default_rng(config.seed))
    for length, name in names.items():
        cells = [
            (cell, depth, index)
            for cell, depth in enumerate(config.depths if config.needles == 1 else (None,))
            for index in range(config.samples)
        ]
        samples = (
            _sample(config, haystack, length, depth, np.random.default_rng([config.seed, length, cell, index]))
            for cell, depth, index in track(cells, f"{length} tokens", transient=True, console=console)
        )
        count = write_json_lines(config.output / name, map(needle_record, samples))
        print(f"{count} samples of {length} tokens in {config.output / name}")


def _sample(
    config: GenerateConfig, haystack: Haystack, length: int, depth: float | None, generator: np.random.Generator
) -> Sample:
    if depth is None:
        return draw_needles(
            generator,
            haystack=haystack,
            length=length,
            room=config.room,
            needles=config.needles,
            retrieved=config.retrieved,
        )
    return draw_needle(
        generator,
        haystack=haystack,
        length=length,
        room=config.room,
        style=config.style,
        depth=depth,
        distractors=config.distractors,
    )


@hydra.main(config_path="../../conf", config_name="generate_needle", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into files."""
    with exit_on_bad_input():
        generate(from_mapping(GenerateConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
