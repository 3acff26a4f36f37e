"""The planner's memory beside compiled steps; conf/check_memory_model.yaml documents every key."""

import csv
import dataclasses
import fnmatch
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.layout import Layout
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.nn.parallel import SequenceStrategy
from ring_rl.nn.transformer import TransformerConfig
from ring_rl.planning.compile_process import CompileProcesses, compiler_versions, key_of, remembered
from ring_rl.planning.compiled_step import AttentionBlock, StepRequest
from ring_rl.planning.memory_model import Compiler, step_memory
from ring_rl.planning.probe_cache import ProbeCache, open_probe_cache, read_probes
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.planning.topology import machine_named
from ring_rl.training.mesh import MeshConfig
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.provenance import git_commit, versions

OUTPUTS = ("memory.csv", "memory.png", "summary.json")
Change = int | float | bool | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCase:
    """Machine, mesh and batch of a case.

    Attributes:
        machine: A name that `machine_named` knows.
        rows: Sequences of each group of devices that shares one.
        tokens_per_device: Of each of these sequences.
    """

    machine: str
    dp: int
    fsdp: int
    tp: int
    sp: int
    strategy: SequenceStrategy
    ulysses_size: int
    layout: Layout
    weights_over_ring: bool
    tokens_per_device: int
    rows: int
    loss_chunks: int
    vocabulary_size: int
    tied_embedding: bool
    attention_block: AttentionBlock
    heads_at_once: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is compared."""

    transformer: TransformerConfig
    optimizer: OptimizerConfig
    step: StepCase
    cases: dict[str, dict[str, dict[str, Change]]]
    groups: tuple[str, ...]
    tolerance: float
    fitted: tuple[str, ...]
    compile: bool
    probes: Path
    further_probes: tuple[Path, ...]
    lm_memory: Path | None
    memory_by_option: Path | None
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}; 0.1 is a tenth")
        for name in self.groups:
            if name not in self.cases:
                raise ValueError(f"groups names {name!r}; the groups are {', '.join(self.cases)}")

    def chosen(self) -> dict[str, tuple[str, StepRequest]]:
        """(machine, step) of every case of the groups asked for.

        Raises:
            ValueError: A case changes what is no key of `transformer` or `step`, or makes no sense.
        """
        return {
            f"{group}: {name}": self.request(changes, path=f"cases.{group}.{name}")
            for group in self.groups
            for name, changes in self.cases[group].items()
        }

    def request(self, changes: Mapping[str, Any], *, path: str) -> tuple[str, StepRequest]:
        """(machine, step) of the base with these keys of `transformer` and `step` changed; `path` is for messages."""
        ours = {field.name for field in dataclasses.fields(StepCase)}
        transformer = to_mapping(self.transformer) | {key: changes[key] for key in changes if key not in ours}
        step = to_mapping(self.step) | {key: changes[key] for key in changes if key in ours}
        case = from_mapping(StepCase, step, path=path)
        return case.machine, StepRequest(
            model=LanguageModelConfig(
                name="language",
                vocabulary_size=case.vocabulary_size,
                tied_embedding=case.tied_embedding,
                embedding_scale=0.02,
                trained_positions=0,
                transformer=from_mapping(TransformerConfig, transformer, path=path),
            ),
            mesh=MeshConfig(dp=case.dp, fsdp=case.fsdp, tp=case.tp, sp=case.sp),
            layout=case.layout,
            strategy=case.strategy,
            ulysses_size=case.ulysses_size,
            weights_over_ring=case.weights_over_ring,
            context=case.tokens_per_device * case.sp,
            batch_size=case.rows * case.dp * case.fsdp,
            loss_chunks=case.loss_chunks,
            optimizer=self.optimizer,
            attention_block=case.attention_block,
            heads_at_once=case.heads_at_once,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One compiled step."""

    name: str
    compiler: Compiler
    compiled_bytes: int
    planned_bytes: int
    moment: str
    parts: dict[str, int]

    def fitted(self, patterns: tuple[str, ...]) -> bool:
        """Whether the formula's constants were chosen with this step in view; each pattern is one of names."""
        return any(fnmatch.fnmatchcase(self.name, pattern) for pattern in patterns)

    @property
    def error(self) -> float:
        """Planned over compiled, less 1."""
        return self.planned_bytes / self.compiled_bytes - 1


def compared(name: str, machine: str, request: StepRequest, compiled_bytes: int) -> Comparison:
    """The formula beside the compiler."""
    compiler: Compiler = "cpu" if machine.startswith(("cpu", "gpu")) else "tpu"
    memory = step_memory(StepSizes(request), compiler=compiler)
    return Comparison(
        name=name,
        compiler=compiler,
        compiled_bytes=compiled_bytes,
        planned_bytes=memory.total,
        moment=memory.moment,
        parts=memory.parts,
    )


def compile_cases(config: CheckConfig, cache: ProbeCache, console: Console) -> list[Comparison]:
    """Every case that fits its machine, as far as it is known or may be compiled."""
    cases = config.chosen()
    machines = {name: machine_named(machine) for name, (machine, _) in cases.items()}
    missing = [name for name in cases if cache.get(key_of(cases[name][1], machines[name])) is None]
    seconds = [probe.memory.compile_seconds for probe in cache.all()]
    each = f", about {np.median(seconds):.0f} s each by those before" if seconds and missing else ""
    console.print(f"{len(cases)} cases, {len(missing)} to compile{each}")
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with CompileProcesses() as processes, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(missing))
        for name, (machine, request) in cases.items():
            if name in missing:
                if not config.compile:
                    continue
                progress.update(bar, description=name)
            memory = remembered(request, machines[name], cache=cache, processes=processes)
            progress.advance(bar, int(name in missing))
            if memory.peak_bytes is None:
                console.print(f"{name}: more than the compiler takes, left out")
                continue
            found.append(compared(name, machine, request, memory.peak_bytes))
    return found


def further(config: CheckConfig) -> list[Comparison]:
    """What is known from other files of probes, under the case's name where it is one.

    Raises:
        FileNotFoundError: There is no such file.
    """
    chosen = config.chosen().items()
    cases = {_identity(key_of(request, machine_named(machine))): name for name, (machine, request) in chosen}
    found = []
    for path in config.further_probes:
        if not path.is_file():
            raise FileNotFoundError(f"further_probes names {path}, which does not exist")
        for probe in read_probes(path):
            if probe.memory.peak_bytes is not None:
                request, machine = from_mapping(StepRequest, probe.key["request"]), probe.key["machine"]
                name = cases.get(_identity(probe.key)) or described(machine, request)
                found.append(compared(name, machine, request, probe.memory.peak_bytes))
    return found


def _identity(key: Mapping[str, Any]) -> str:
    """Of a step, whichever compiler was asked."""
    return json.dumps([key["machine"], key["request"]], sort_keys=True)


def described(machine: str, request: StepRequest) -> str:
    """A step in words."""
    sizes, config = StepSizes(request), request.model.transformer
    words = [
        f"{machine}: {config.layers} layers of {config.width}",
        f"{sizes.attention_strategy} of {sizes.tokens} tokens",
        *([f"{config.saved_activations} saved"] if config.saved_activations != "none" else []),
        *(["feed-forward at once"] if config.feed_forward_chunks == 1 else []),
        *([f"heads at once: {request.heads_at_once}"] if request.heads_at_once is not None else []),
    ]
    return ", ".join(words)


def published(config: CheckConfig) -> list[Comparison]:
    """What other experiments compiled for CPU devices and wrote down.

    Raises:
        FileNotFoundError: A folder holds no such results.
    """
    found = []
    if config.lm_memory is not None:
        settings, rows = _read_results(config.lm_memory)
        for row in rows:
            tokens, devices = int(row["tokens"]), int(row["devices"])
            changes = settings["transformer"] | {
                "machine": f"gpu:{devices}xany-80GB",
                "sp": devices,
                "tokens_per_device": tokens // devices,
                "weights_over_ring": False,
                "loss_chunks": settings["chunks"],
                "vocabulary_size": settings["vocabulary_size"],
                "tied_embedding": settings["tied_embedding"],
            }
            machine, request = config.request(changes, path=str(config.lm_memory))
            name = f"lm_memory: {tokens} tokens, {devices} devices"
            found.append(compared(name, machine, request, int(row["training_bytes"])))
    if config.memory_by_option is not None:
        settings, rows = _read_results(config.memory_by_option)
        for row in rows:
            changes = settings["transformer"] | {
                "feed_forward": "gelu",
                "machine": f"gpu:{settings['devices']}xany-80GB",
                "sp": settings["devices"],
                "tokens_per_device": int(row["tokens"]) // settings["devices"],
                "vocabulary_size": settings["vocabulary"],
                "saved_activations": row["saved_activations"],
                "feed_forward_chunks": int(row["feed_forward_chunks"]),
                "loss_chunks": int(row["loss_chunks"]),
                "weights_over_ring": row["weights_over_ring"] == "True",
            }
            machine, request = config.request(changes, path=str(config.memory_by_option))
            name = f"memory_by_option: {row['name']}"
            found.append(compared(name, machine, request, int(row["needed_bytes"])))
    return found


def _read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    settings = json.loads((folder / "summary.json").read_text())["config"]
    with (folder / "memory.csv").open(newline="") as file:
        return settings, list(csv.DictReader(file))


def draw(comparisons: list[Comparison], patterns: tuple[str, ...]) -> Figure:
    """Planned against compiled; hollow where `patterns` says that the formula was fitted."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    everything = [each.compiled_bytes for each in comparisons]
    ends = np.array([min(everything), max(everything)]) / 2**30
    axes.plot(ends, ends, color="0.6", linewidth=0.8)
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="0.9", label="within 10 %")
    for compiler, label, colour in (("tpu", "TPU compiler", "C0"), ("cpu", "CPU compiler, for GPUs", "C1")):
        for fitted, fill in ((False, colour), (True, "none")):
            points = [each for each in comparisons if each.compiler == compiler and each.fitted(patterns) == fitted]
            if points:
                sizes = np.array([(each.compiled_bytes, each.planned_bytes) for each in points]).T / 2**30
                label_here = label + ", fitted" * fitted
                axes.plot(*sizes, "o", color=colour, markerfacecolor=fill, markersize=4, label=label_here)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("compiled, GiB a device")
    axes.set_ylabel("planned, GiB a device")
    axes.legend()
    return figure


def write_results(config: CheckConfig, comparisons: list[Comparison]) -> None:
    """CSV, picture and provenance."""
    config.output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    names = list(dict.fromkeys(part for each in comparisons for part in each.parts))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "compiler", "fitted", "compiled_bytes", "planned_bytes", "error", "moment", *names])
    for each in comparisons:
        figures = [each.parts.get(part, 0) for part in names]
        is_fitted = str(each.fitted(config.fitted)).lower()
        row = [each.name, each.compiler, is_fitted, each.compiled_bytes, each.planned_bytes, f"{each.error:.4f}"]
        writer.writerow([*row, each.moment, *figures])
    write_whole(config.output / "memory.csv", text.getvalue())
    with atomic_file(config.output / "memory.png", overwrite=True) as temporary:
        draw(comparisons, config.fitted).savefig(temporary, dpi=130)
    summary = {
        "config": to_mapping(config),
        "compared": len(comparisons),
        "within_tolerance": sum(abs(each.error) <= config.tolerance for each in comparisons),
        "worst_error": max(comparisons, key=lambda each: abs(each.error)).error,
        "errors": {
            f"{compiler}, {'fitted' if fitted else 'held out'}": _errors(group)
            for compiler in ("tpu", "cpu")
            for fitted in (True, False)
            if (group := [c for c in comparisons if c.compiler == compiler and c.fitted(config.fitted) == fitted])
        },
        "commit": git_commit(),
        "compilers": dict(compiler_versions()),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def _errors(comparisons: list[Comparison]) -> dict[str, float | int]:
    errors = np.array([each.error for each in comparisons])
    return {
        "compared": len(errors),
        "smallest": round(float(errors.min()), 4),
        "median_size": round(float(np.median(np.abs(errors))), 4),
        "largest": round(float(errors.max()), 4),
    }


def check(config: CheckConfig) -> list[Comparison]:
    """Compiles what is missing, compares and reports.

    Raises:
        ValueError: Nothing is known and nothing may be compiled.
    """
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    console = Console()
    with open_probe_cache(config.probes) as cache:
        comparisons = compile_cases(config, cache, console)
    known = {each.name for each in comparisons}
    comparisons += [each for each in further(config) if each.name not in known] + published(config)
    if not comparisons:
        raise ValueError(f"nothing to compare: {config.probes} knows none of the cases; set compile=true")
    write_results(config, comparisons)
    table = Table("case", "compiled", "planned", "error", "peak in", "fitted")
    for each in comparisons:
        colour = "" if abs(each.error) <= config.tolerance else "[red]"
        sizes = (f"{each.compiled_bytes / 2**30:.3f} GiB", f"{each.planned_bytes / 2**30:.3f} GiB")
        fitted = "fitted" * each.fitted(config.fitted)
        table.add_row(each.name, *sizes, f"{colour}{each.error:+.1%}", each.moment, fitted)
    console.print(table)
    return comparisons


def last_line(config: CheckConfig, comparisons: list[Comparison]) -> str:
    """name=value, for programs."""
    errors = np.abs([each.error for each in comparisons])
    held_out = [abs(each.error) for each in comparisons if not each.fitted(config.fitted)]
    within = f"within_{100 * config.tolerance:.0f}={int((errors <= config.tolerance).sum())}/{len(errors)}"
    not_fitted = f" held_out_worst_error={max(held_out):.3f}" if held_out else ""
    return f"worst_error={errors.max():.3f} median_error={np.median(errors):.3f} {within}{not_fitted}"


@hydra.main(config_path="../conf", config_name="check_memory_model", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a comparison."""
    with exit_on_bad_input():
        config = from_mapping(CheckConfig, resolve(cfg))
        print(last_line(config, check(config)))


if __name__ == "__main__":
    run_entry_point(main)
