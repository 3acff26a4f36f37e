"""What a language model finds in long contexts; conf/evaluate_lm.yaml documents every key."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hydra
from flax import nnx
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.documents.document import digest
from ring_rl.lm.documents.load import read_tokens
from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.evaluation.perplexity_suite import (
    PerplexityConfig,
    PerplexityRecord,
    chosen_documents,
    evaluate_perplexity,
    missing_perplexities,
    write_perplexity_report,
)
from ring_rl.lm.evaluation.prompts import Prompter, TemplateConfig
from ring_rl.lm.evaluation.report import ReportConfig, Subject, write_report
from ring_rl.lm.evaluation.run import Questioner, QuestionsConfig, evaluate, missing_samples
from ring_rl.lm.evaluation.sample_log import SampleLog
from ring_rl.lm.evaluation.suites import MAY_GROW, SuiteConfig, make_suite
from ring_rl.lm.load_model import LoadedModel, ModelSource, load_model, warn_beyond_trained_positions
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.fingerprint import fingerprint_of_arrays
from ring_rl.training.mesh import MeshConfig, request_virtual_devices
from ring_rl.training.parallel_config import LaidOutParallelConfig, make_parallel
from ring_rl.training.provenance import device_description, git_commit, versions

T = TypeVar("T", SampleRecord, PerplexityRecord)

# Where things lie, and in what memory the same is computed.
MAY_DIFFER = (*MAY_GROW, "suite.chunks", "suite.haystack", "suite.documents.token_cache", "suite.documents.source.root")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateLMConfig:
    """Who is asked what, and where the answers go."""

    model: ModelSource
    suite: SuiteConfig | PerplexityConfig
    template: TemplateConfig
    questions: QuestionsConfig
    report: ReportConfig
    output: Path
    label: str | None
    mesh: MeshConfig
    parallel: LaidOutParallelConfig
    virtual_devices: int


def identity(config: EvaluateLMConfig, loaded: LoadedModel, text: str | None) -> dict[str, Any]:
    """What a sample's result depends on; where model and text lie and on which devices it runs is not among it.

    The model's own numbers are, and the text's: another one of the same name would be given the first one's answers.
    """
    model = to_mapping(config.model)
    for free in ("run_dir", "path", "step", "feed_forward_chunks", "attention_block_size", "saved_activations"):
        model.pop(free, None)
        model["overrides"].pop(free, None)
    origin = {key: loaded.origin.get(key) for key in ("label", "seed", "step")}
    return {
        "model": {**model, **origin},
        "suite": to_mapping(config.suite),
        "template": to_mapping(config.template),
        "weights": fingerprint_of_arrays(nnx.state(loaded.model, nnx.Param)),
        "text": text,
    }


def model_label(config: EvaluateLMConfig, loaded: LoadedModel) -> str:
    """What tables call the model."""
    return config.label or loaded.origin.get("label") or Path(loaded.origin["path"]).stem


def provenance() -> dict[str, Any]:
    """Of the summary."""
    return {
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "flax"),
    }


@contextlib.contextmanager
def progress_bar(total: int, done: int) -> Iterator[Callable[[str, int], None]]:
    """A bar with the time left; gives what hears of answered samples. Ctrl-C loses the batch under way and no more."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("compiling", total=total, completed=done)
        try:
            yield lambda what, count: progress.update(bar, advance=count, description=what)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what is answered is written; the same command again asks the rest") from None


def opened_log(
    config: EvaluateLMConfig, loaded: LoadedModel, record_type: type[T], *, text: str | None
) -> SampleLog[T]:
    """The output folder's log; `text` is the fingerprint of what is read."""
    key: Callable[[T], Hashable] = lambda record: record.key  # noqa: E731
    return SampleLog(
        config.output, record_type=record_type, key=key, identity=identity(config, loaded, text), may_differ=MAY_DIFFER
    )


def ask(
    config: EvaluateLMConfig,
    suite_config: SuiteConfig,
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    parallel: SequenceParallel,
) -> dict[str, float]:
    """A suite of questions; returns the main figures by name."""
    prompter = Prompter(tokenizer, config.template)
    suite, modes = make_suite(suite_config, prompter), config.questions.modes
    warn_beyond_trained_positions(loaded.config, len(prompter.prompt(suite.sample(suite.cells()[-1], 0))))
    questioner = Questioner(loaded.model, prompter, parallel=parallel, questions=config.questions)
    wanted = [cell.key(mode, index) for cell in suite.cells() for mode in modes for index in range(suite.samples)]
    with opened_log(config, loaded, SampleRecord, text=suite.text_fingerprint) as log:
        left = sum(map(len, missing_samples(suite, log, modes).values()))
        with progress_bar(len(wanted), len(wanted) - left) as on_samples:
            evaluate(questioner, suite, log, on_samples=on_samples)
        records = [log.records[key] for key in wanted]
    summary = write_report(
        records,
        config.output,
        suite=suite_config.name,
        unit=suite.unit,
        subject=Subject(
            name=model_label(config, loaded),
            trained_length=loaded.config.trained_positions or None,
            seed=suite_config.seed,
            settings=to_mapping(config),
            provenance=provenance(),
        ),
        config=config.report,
    )
    return {f"{each['task']}_{each['length']}_{each['mode']}": each["score"]["value"] for each in summary["scores"]}


def measure_perplexity(
    config: EvaluateLMConfig,
    suite: PerplexityConfig,
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    parallel: SequenceParallel,
) -> dict[str, float]:
    """Perplexity of documents; returns the main figures by name."""
    tokenized = read_tokens(suite.documents, tokenizer, progress=True)
    documents = chosen_documents(tokenized, suite)
    warn_beyond_trained_positions(loaded.config, suite.lengths[-1])
    # Not the files' own fingerprint: a copy of a corpus elsewhere is the same text.
    text = digest(*(f"{name} {length}" for name, length in zip(tokenized.names, tokenized.lengths, strict=True)))
    with opened_log(config, loaded, PerplexityRecord, text=text) as log:
        total = len(suite.rules) * len(suite.lengths) * len(documents)
        left = len(missing_perplexities(suite, list(documents), log))
        with progress_bar(total, total - left) as on_samples:
            evaluate_perplexity(
                loaded.model,
                documents,
                suite,
                log,
                parallel=parallel,
                batch_tokens=config.questions.batch_tokens,
                on_samples=on_samples,
            )
        records = [
            log.records[rule, length, name] for rule in suite.rules for length in suite.lengths for name in documents
        ]
    summary = write_perplexity_report(
        records,
        config.output,
        name=model_label(config, loaded),
        trained_length=loaded.config.trained_positions or None,
        settings=to_mapping(config),
        provenance=provenance(),
    )
    return {f"perplexity_{each['rule']}_{each['length']}": each["value"] for each in summary["perplexity"]}


def evaluate_lm(config: EvaluateLMConfig) -> None:
    """Asks what is missing, then prints a table and writes CSV, Markdown, JSON and pictures."""
    request_virtual_devices(config.virtual_devices)
    parallel = make_parallel(config.mesh, config.parallel, layout=config.parallel.layout)
    loaded = load_model(config.model, parallel)
    tokenizer = loaded.named_tokenizer()
    warnings.simplefilter("always", UserWarning)
    if isinstance(config.suite, PerplexityConfig):
        figures = measure_perplexity(config, config.suite, loaded, tokenizer, parallel)
    else:
        figures = ask(config, config.suite, loaded, tokenizer, parallel)
    show(config.output, f"{model_label(config, loaded)}: {config.suite.name}")
    print(" ".join(f"{name}={value:.3f}" for name, value in figures.items()))


def show(output: Path, title: str) -> None:
    """Prints the table that was written."""
    head, _, *lines = (output / "table.md").read_text().splitlines()
    table = Table(title=title)
    for column in head.strip("|").split("|"):
        table.add_column(column.strip())
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
