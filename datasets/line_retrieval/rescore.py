"""Scores answers that LongEval's own script has written, by this project's scorer, and compares.

    git clone https://github.com/DachengLi1/LongChat
    python datasets/line_retrieval/rescore.py responses=LongChat/longeval/evaluation/lines/predictions

Settings: conf/rescore_longeval.yaml.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.tasks.sample_files import read_longeval_responses
from ring_rl.lm.tasks.scorers import last_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RescoreConfig:
    """A folder of folders of `<n>_response.txt`, one a model."""

    responses: Path


def rescore(config: RescoreConfig) -> None:
    """Prints accuracies beside LongEval's, and stops with an error where they differ."""
    files = sorted(
        config.responses.glob("*/*_response.txt"),
        key=lambda path: (path.parent.name, int(path.name.removesuffix("_response.txt"))),
    )
    if not files:
        raise FileNotFoundError(f"{config.responses} holds no <model>/<n>_response.txt")
    answers, differing = 0, []
    for path in files:
        responses = read_longeval_responses(path)
        numbers = [last_integer(output) for output in responses.outputs]
        right = sum(map(int.__eq__, numbers, responses.labels))
        accuracy = right / len(numbers)
        answers += len(numbers)
        shipped = "-" if responses.accuracy is None else f"{responses.accuracy:.2f}"
        name = f"{path.parent.name} {path.name.removesuffix('_response.txt')} lines"
        print(f"{name}: {right}/{len(numbers)} = {accuracy:.2f}, LongEval {shipped}")
        if tuple(numbers) != responses.parsed or responses.accuracy not in (None, accuracy):
            differing.append(name)
    if differing:
        raise ValueError(f"the scorers differ on {', '.join(differing)}")
    print(f"the scorers agree on all {answers} answers in {len(files)} files")


@hydra.main(config_path="../../conf", config_name="rescore_longeval", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a comparison."""
    with exit_on_bad_input():
        rescore(from_mapping(RescoreConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
