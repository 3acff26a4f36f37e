"""Writes LongEval's line retrieval as its own files are: one JSON object a line, one file a number of lines.

    python datasets/line_retrieval/generate.py lines=[200,680] output=datasets/line_retrieval/data

Settings: conf/generate_line_retrieval.yaml.
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
from ring_rl.lm.key_words import WordList, key_words
from ring_rl.lm.tasks.line_retrieval import IndexKind, draw_lines
from ring_rl.lm.tasks.sample import Sample
from ring_rl.lm.tasks.sample_files import check_new, longeval_testcase, write_json_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which records go where."""

    lines: tuple[int, ...]
    samples: int
    index_kind: IndexKind
    words: WordList
    seed: int
    output: Path

    def __post_init__(self) -> None:
        if not self.lines or min(self.lines) < 1 or self.samples < 1:
            raise ValueError(
                f"lines and samples must be positive, got lines={list(self.lines)} and samples={self.samples}"
            )


def generate(config: GenerateConfig) -> None:
    """Writes and says what was written."""
    console = Console(stderr=True)
    names = {lines: f"{lines}_lines.jsonl" for lines in config.lines}
    check_new(config.output, list(names.values()))
    words = key_words(config.words)

    def drawn(lines: int, index: int) -> Sample:
        generator = np.random.default_rng([config.seed, lines, index])
        return draw_lines(generator, lines=lines, index_kind=config.index_kind, words=words, answer_start="none")

    # More lines than names are known before anything is written.
    drawn(max(config.lines), 0)
    for lines, name in names.items():
        samples = (
            drawn(lines, index)
            for index in track(range(config.samples), f"{lines} lines", transient=True, console=console)
        )
        count = write_json_lines(config.output / name, map(longeval_testcase, samples))
        print(f"{count} records of {lines} lines in {config.output / name}")


@hydra.main(config_path="../../conf", config_name="generate_line_retrieval", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into files."""
    with exit_on_bad_input():
        generate(from_mapping(GenerateConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
