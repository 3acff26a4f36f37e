"""What a language model finds in long contexts; conf/evaluate_lm.yaml documents every key."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.evaluation.prompts import Prompter, TemplateConfig
from ring_rl.lm.evaluation.report import ReportConfig, Subject, write_report
from ring_rl.lm.evaluation.run import Questioner, QuestionsConfig, evaluate, missing_samples
from ring_rl.lm.evaluation.sample_log import SampleLog
from ring_rl.lm.evaluation.suites import MAY_GROW, SuiteConfig, make_suite
from ring_rl.lm.load_model import LoadedModel, ModelSource, load_model, warn_beyond_trained_positions
from ring_rl.training.mesh import MeshConfig, request_virtual_devices
from ring_rl.training.parallel_config import ParallelConfig, make_parallel
from ring_rl.training.provenance import device_description, git_commit, versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateLMConfig:
    """Who is asked what, and where the answers go."""

    model: ModelSource
    suite: SuiteConfig
    template: TemplateConfig
    questions: QuestionsConfig
    report: ReportConfig
    output: Path
    label: str | None
    mesh: MeshConfig
    parallel: ParallelConfig
    virtual_devices: int


def identity(config: EvaluateLMConfig, loaded: LoadedModel) -> dict[str, Any]:
    """What a sample's result depends on; where the model lies and on which devices it runs is not among it."""
    model = to_mapping(config.model)
    for free in ("run_dir", "path", "step"):
        model.pop(free, None)
    return {
        "model": model | {"step": loaded.origin.get("step"), "label": loaded.origin.get("label")},
        "suite": to_mapping(config.suite),
        "template": to_mapping(config.template),
    }


def model_label(config: EvaluateLMConfig, loaded: LoadedModel) -> str:
    """What tables call the model."""
    return config.label or loaded.origin.get("label") or Path(loaded.origin["path"]).stem


def evaluate_lm(config: EvaluateLMConfig) -> None:
    """Asks what is missing, then prints a table and writes CSV, Markdown, JSON and pictures."""
    request_virtual_devices(config.virtual_devices)
    parallel = make_parallel(config.mesh, config.parallel)
    loaded = load_model(config.model, parallel)
    if loaded.tokenizer is None:
        raise ValueError("the model came without a tokenizer; name one: model.tokenizer")
    prompter = Prompter(loaded.tokenizer, config.template)
    suite = make_suite(config.suite, prompter)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        longest = suite.cells()[-1]
        warn_beyond_trained_positions(loaded.config, len(prompter.prompt(suite.sample(longest, 0))))
    questioner = Questioner(loaded.model, prompter, parallel=parallel, questions=config.questions)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with SampleLog(
        config.output,
        record_type=SampleRecord,
        key=lambda record: record.key,
        identity=identity(config, loaded),
        may_differ=MAY_GROW,
    ) as log:
        total = len(suite.cells()) * suite.samples * len(config.questions.modes)
        left = sum(map(len, missing_samples(suite, log, config.questions.modes).values()))
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            bar = progress.add_task("compiling", total=total, completed=total - left)
            evaluate(
                questioner,
                suite,
                log,
                on_samples=lambda what, count: progress.update(bar, advance=count, description=what),
            )
        wanted = [
            cell.key(mode, index)
            for cell in suite.cells()
            for mode in config.questions.modes
            for index in range(suite.samples)
        ]
        records = [log.records[key] for key in wanted]
    subject = Subject(
        name=model_label(config, loaded),
        trained_length=loaded.config.trained_positions or None,
        seed=config.suite.seed,
        settings=to_mapping(config),
        provenance={
            "commit": git_commit(),
            "device": device_description(),
            "versions": versions("ring_rl", "jax", "flax"),
        },
    )
    summary = write_report(
        records, config.output, suite=config.suite.name, unit=suite.unit, subject=subject, config=config.report
    )
    show(config.output, subject.name)
    print(
        " ".join(
            f"{each['task']}_{each['length']}_{each['mode']}={each['score']['value']:.3f}" for each in summary["scores"]
        )
        + f" samples={len(records)}"
    )


def show(output: Path, title: str) -> None:
    """Prints the table that was written."""
    head, _, *lines = (output / "table.md").read_text().splitlines()
    table = Table(title=f"{title}: share of right answers with its 95% interval")
    for column in head.strip("| ").split(" | "):
        table.add_column(column)
    for line in lines:
        table.add_row(*(cell.strip() for cell in line.strip("|").split("|")))
    # Wide enough for every cell, whatever the terminal: a table that is cut says nothing.
    Console(width=max(200, Console().width)).print(table)


@hydra.main(config_path="../conf", config_name="evaluate_lm", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into an evaluation."""
    with exit_on_bad_input():
        evaluate_lm(from_mapping(EvaluateLMConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
