"""Writes six of RULER's tasks as its own files are: `<length>/<task>/validation.jsonl`, one JSON object a line.

    python datasets/ruler/generate.py lengths=[16384,32768] output=datasets/ruler/data

Settings: conf/generate_ruler.yaml.
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
from ring_rl.lm.tasks.ruler import RulerSource
from ring_rl.lm.tasks.ruler_tasks import RULER_TASKS, RulerTaskName
from ring_rl.lm.tasks.sample_files import check_new, ruler_record, write_json_lines
from ring_rl.lm.tokenizer.load import TokenizerConfig, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which tasks go where."""

    tokenizer: TokenizerConfig
    tasks: tuple[RulerTaskName, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    output: Path

    def __post_init__(self) -> None:
        if not self.tasks or not self.lengths or self.samples < 1:
            raise ValueError("tasks and lengths name at least one each, and samples is at least 1")


def generate(config: GenerateConfig) -> None:
    """Writes and says what was written."""
    console = Console(stderr=True)
    names: dict[tuple[int, RulerTaskName], str] = {
        (length, task): f"{length}/{task}/validation.jsonl" for length in config.lengths for task in config.tasks
    }
    check_new(config.output, list(names.values()))
    tokenizer = load_tokenizer(config.tokenizer)
    # All sizes are searched for first: a length that is too short for a task is known before anything is written.
    sources = {
        (length, task): RulerSource(task, length=length, room=RULER_TASKS[task].tokens_to_generate, tokenizer=tokenizer)
        for length, task in track(names, "sizes", transient=True, console=console)
    }
    for (length, task), name in names.items():
        room, source = RULER_TASKS[task].tokens_to_generate, sources[length, task]
        samples = (
            source.sample(np.random.default_rng([config.seed, length, list(RULER_TASKS).index(task), index]))
            for index in track(range(config.samples), f"{task}, {length} tokens", transient=True, console=console)
        )
        count = write_json_lines(
            config.output / name,
            (ruler_record(sample, index=index, room=room, tokenizer=tokenizer) for index, sample in enumerate(samples)),
        )
        print(f"{count} samples of {task} at {length} tokens in {config.output / name}")


@hydra.main(config_path="../../conf", config_name="generate_ruler", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into files."""
    with exit_on_bad_input():
        generate(from_mapping(GenerateConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
