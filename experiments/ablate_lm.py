"""Which parts of the retrieval recipe matter; conf/ablate_lm.yaml documents every key."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from ring_rl.atomic_file import write_whole
from ring_rl.child_process import run_script
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.metrics import read_metrics
from ring_rl.training.provenance import read_starts
from ring_rl.training.stage_records import read_stage_records, whole_seconds
from ring_rl.training.tables import csv_table, markdown_table

REPOSITORY = Path(__file__).parents[1]
run = functools.partial(run_script, REPOSITORY)
CHANGES = REPOSITORY / "conf" / "lm_ablation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateLmConfig:
    """Which changes of which recipe, and how they are judged."""

    recipe: str
    ablations: tuple[str, ...]
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    samples: int
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    runs: Path
    output: Path
    report_only: bool

    def __post_init__(self) -> None:
        for name in ("ablations", "seeds", "lengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, and none twice; got {list(values)}")
        for ablation in self.ablations:
            if not (CHANGES / f"{ablation}.yaml").is_file():
                known = ", ".join(sorted(path.stem for path in CHANGES.glob("*.yaml")))
                raise ValueError(f"there is no ablation {ablation}; choose among {known}")

    @property
    def cells(self) -> Iterator[tuple[str, int, Path]]:
        """Change, seed, and the folder of its run; the evaluation lies beside it."""
        for ablation in self.ablations:
            for seed in self.seeds:
                yield ablation, seed, self.runs / ablation / f"seed_{seed}"


def what_it_changes(ablation: str) -> str:
    """The sentence at the head of its file."""
    lines = (CHANGES / f"{ablation}.yaml").read_text().splitlines()
    comment = [line.removeprefix("#").strip() for line in lines[1:] if line.startswith("#")]
    return " ".join(comment).split(". ")[0].split(";")[0].rstrip(".")


def train_and_evaluate(config: AblateLmConfig, ablation: str, seed: int, run_dir: Path) -> None:
    """What is missing of one cell."""
    run(
        "experiments/train_lm.py",
        f"+experiment={config.recipe}",
        f"+lm_ablation={ablation}",
        f"seed={seed}",
        f"run_dir={run_dir}",
        *config.train,
    )
    run(
        "experiments/evaluate_lm.py",
        "model=run",
        f"model.run_dir={run_dir}",
        "suite=line_retrieval",
        f"suite.lengths=[{','.join(map(str, config.lengths))}]",
        f"suite.samples={config.samples}",
        f"output={evaluation_of(run_dir)}",
        *config.evaluate,
    )


def evaluation_of(run_dir: Path) -> Path:
    """Where a run's evaluation lies."""
    return run_dir.with_name(f"{run_dir.name}_evaluation")


def result(ablation: str, seed: int, run_dir: Path) -> dict[str, Any] | None:
    """One row of the CSV; None for a cell that is not finished."""
    stages, summary_file = read_stage_records(run_dir), evaluation_of(run_dir) / "summary.json"
    if not (stages and summary_file.exists()):
        return None
    summary = json.loads(summary_file.read_text())
    row: dict[str, Any] = {"ablation": ablation, "seed": seed}
    for name, stage in stages.items():
        row[f"steps_{name}"] = stage.last_step - stage.first_step
        row[f"advanced_{name}"] = stage.advanced
    if (seconds := whole_seconds(stages.values())) is not None:
        row["seconds"] = round(seconds, 1)
    row["training_answer_accuracy"] = round(read_metrics(run_dir / "metrics.jsonl")[-1]["answer_accuracy"], 4)
    for score in summary["scores"]:
        for part in ("value", "low", "high", "count"):
            row[f"{part}_{score['length']}"] = round(score["score"][part], 4)
    return row


def write_report(config: AblateLmConfig, rows: list[dict[str, Any]]) -> None:
    """ablations.csv, table.md and summary.json."""
    config.output.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_whole(config.output / "ablations.csv", csv_table(rows))
    stages = [name.removeprefix("steps_") for name in columns if name.startswith("steps_")]
    head = ["change", "seed", *(f"steps of {name}" for name in stages), *(f"right at {n}" for n in config.lengths)]
    table = [head]
    for row in rows:
        steps = [f"{row[f'steps_{name}']}{'' if row[f'advanced_{name}'] else ' (all)'}" for name in stages]
        right = [
            f"{row[f'value_{n}']:.2f} [{row[f'low_{n}']:.2f}, {row[f'high_{n}']:.2f}]" if f"value_{n}" in row else "-"
            for n in config.lengths
        ]
        table.append([what_it_changes(row["ablation"]), str(row["seed"]), *steps, *right])
    write_whole(config.output / "table.md", markdown_table(table))
    starts = [read_starts(run_dir) for _, _, run_dir in config.cells]
    summary = {"config": to_mapping(config), "starts": [each[-1] for each in starts if each]}
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def ablate(config: AblateLmConfig) -> None:
    """Trains and evaluates what is missing, then writes the table of all that there is."""
    if not config.report_only:
        for ablation, seed, run_dir in config.cells:
            train_and_evaluate(config, ablation, seed, run_dir)
    rows = [row for cell in config.cells if (row := result(*cell)) is not None]
    if not rows:
        raise ValueError(f"no run below {config.runs} is trained and evaluated; set report_only=false")
    write_report(config, rows)
    print(f"cells={len(list(config.cells))} reported={len(rows)} table={config.output / 'table.md'}")


@hydra.main(config_path="../conf", config_name="ablate_lm", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a table."""
    with exit_on_bad_input():
        ablate(from_mapping(AblateLmConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
