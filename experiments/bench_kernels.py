"""Speed and memory of attention, ours and others'; conf/bench_kernels.yaml documents every key."""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import hydra
import numpy as np
from kernel_baselines.processes import Implementation, Platform, Workers
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.pairs import visible_pairs
from ring_rl.training.provenance import git_commit

OUTPUTS = ("results.json", "table.md", "speed.png")
COLORS = {"ring_rl": "tab:blue", "ringattention": "tab:orange", "jax": "tab:green", "torch": "tab:red"}
COLUMNS = (
    *("case", "implementation", "strategy", "layout", "local block", "ring size", "tokens", "mask", "dtype"),
    *("forward s", "forward + backward s"),
)
# Products of the forward pass (q kᵀ, p v) and of both passes (five more), 2 D flops a visible pair each.
FORWARD_PRODUCTS, PRODUCTS = 2, 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseConfig:
    """One line of the table; `experiments/kernel_baselines/benchmark_worker.py` says what the fields mean."""

    implementation: Implementation
    strategy: str | None
    layout: str | None
    local: str | None
    ring_size: int
    ulysses_size: int
    tokens: Literal["short", "long", "longest"]
    mask: Literal["causal", "window", "packed"]
    block_size: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioConfig:
    """Seconds of the fastest of these cases over those of the fastest of those."""

    seconds_of: tuple[str, ...]
    over: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlatformConfig:
    """What is measured on one kind of machine."""

    dtype: Literal["float32", "bfloat16"]
    heads: int
    head_dim: int
    gemm_size: int
    cases: tuple[str, ...]
    ratios: dict[str, RatioConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured, how often, and where the results go."""

    platform: Platform | None
    cases: tuple[str, ...] | None
    rounds: int
    time_limit_seconds: float
    at_least_seconds: float
    batch: int
    seed: int
    tokens: dict[str, int]
    window: int
    packed_documents: int
    document_lengths: Literal["random", "equal"]
    tolerance: dict[str, float]
    output: Path
    overwrite: bool
    definitions: dict[str, CaseConfig]
    platforms: dict[str, PlatformConfig]

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not 1 <= self.packed_documents <= min(self.tokens.values()):
            raise ValueError(
                f"packed_documents must be between 1 and the {min(self.tokens.values())} tokens, "
                f"got {self.packed_documents}"
            )
        if self.cases is not None and not self.cases:
            raise ValueError("cases must name at least one case; null is all of the platform's")
        named = [*(self.cases or ()), *(name for platform in self.platforms.values() for name in platform.cases)]
        for name in named:
            if name not in self.definitions:
                raise ValueError(f"unknown case '{name}'; the cases there are {', '.join(self.definitions)}")


def resolve_case(config: BenchmarkConfig, name: str, platform: Platform) -> dict[str, Any]:
    """The case with every number in it, as a worker wants it."""
    case, machine = config.definitions[name], config.platforms[platform]
    fields = {field: value for field, value in to_mapping(case).items() if field not in ("implementation", "mask")}
    tokens = config.tokens[case.tokens]
    return {
        **fields,
        "name": name,
        "platform": platform,
        "batch": config.batch,
        "tokens": tokens,
        "heads": machine.heads,
        "head_dim": machine.head_dim,
        "dtype": machine.dtype,
        "window": config.window if case.mask == "window" else None,
        "document_lengths": document_lengths(config, tokens) if case.mask == "packed" else None,
        "seed": config.seed,
    }


def document_lengths(config: BenchmarkConfig, tokens: int) -> list[int]:
    """Lengths of the packed documents, each at least 1, `tokens` together."""
    if config.document_lengths == "equal":
        cuts = np.arange(1, config.packed_documents) * tokens // config.packed_documents
    else:
        generator = np.random.default_rng(config.seed)
        cuts = np.sort(generator.choice(np.arange(1, tokens), size=config.packed_documents - 1, replace=False))
    return np.diff(cuts, prepend=0, append=tokens).tolist()


@dataclasses.dataclass
class Measurement:
    """What is known of one case; seconds are one a round."""

    case: dict[str, Any]
    implementation: Implementation
    pairs: int
    temporary_bytes: int | None = None
    errors: dict[str, float] | None = None
    forward_seconds: list[float] = dataclasses.field(default_factory=list)
    forward_backward_seconds: list[float] = dataclasses.field(default_factory=list)
    failure: str | None = None

    @property
    def seconds(self) -> float:
        """Median of forward + backward; nan if it was not measured."""
        return statistics.median(self.forward_backward_seconds) if self.forward_backward_seconds else math.nan

    @property
    def flops_per_second(self) -> float:
        """Useful ones, forward + backward: 14 D H for every pair of a query and a key that it sees."""
        case = self.case
        return 2 * PRODUCTS * case["batch"] * case["heads"] * case["head_dim"] * self.pairs / self.seconds


class Benchmark:
    """Prepares and measures all cases, round by round."""

    def __init__(self, config: BenchmarkConfig, workers: Workers) -> None:
        """Plans the cases of the platform that the workers run on."""
        self.config, self.workers = config, workers
        self.machine = config.platforms[workers.platform]
        self.rounds = 0
        self.gemm: dict[Implementation, list[float]] = {"jax": [], "torch": []}
        self.measurements: dict[str, Measurement] = {}
        for name in config.cases or self.machine.cases:
            case = resolve_case(config, name, workers.platform)
            mask = Mask(causal=True, window=case["window"])
            lengths = case["document_lengths"]
            pairs = visible_pairs(mask, case["tokens"], None if lengths is None else tuple(lengths))
            self.measurements[name] = Measurement(case, config.definitions[name].implementation, pairs)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.measurements) + self.config.rounds * (len(self.gemm) + len(self.measurements))

    def steps(self) -> Iterator[str]:
        """Does one piece of work after another; gives, before each, its name."""
        begin = time.perf_counter()
        at_least = self.config.at_least_seconds
        for name, measurement in self.measurements.items():
            yield f"compile {name}"
            if answer := self._ask(measurement, "prepare", case=measurement.case):
                measurement.temporary_bytes, measurement.errors = answer["temporary_bytes"], answer["errors"]
                measurement.case["local"] = answer["local"]
        round_begin = time.perf_counter()
        for number in range(1, self.config.rounds + 1):
            for library, speeds in self.gemm.items():
                yield f"round {number}: matrix product of {library}"
                with contextlib.suppress(ValueError):  # a library that is not there has no peak
                    size, dtype = self.machine.gemm_size, self.machine.dtype
                    worker = self.workers.get(library, 1)
                    speeds.append(worker.ask("gemm", size=size, dtype=dtype, at_least=at_least)["flops_per_second"])
            for name, measurement in self.measurements.items():
                yield f"round {number}: {name}"
                if answer := self._ask(measurement, "measure", name=name, at_least=at_least):
                    measurement.forward_seconds.append(answer["forward"])
                    measurement.forward_backward_seconds.append(answer["forward_backward"])
            self.rounds = number
            now = time.perf_counter()
            if now - begin + (now - round_begin) > self.config.time_limit_seconds:
                return
            round_begin = now

    def drop_incomplete_round(self) -> None:
        """Forgets what was measured after the last complete round."""
        for speeds in self.gemm.values():
            del speeds[self.rounds :]
        for measurement in self.measurements.values():
            del measurement.forward_seconds[self.rounds :], measurement.forward_backward_seconds[self.rounds :]

    def peak(self) -> float:
        """Flops a second of the faster library's matrix product."""
        return max(statistics.median(speeds) for speeds in self.gemm.values() if speeds)

    def ratios(self) -> dict[str, float]:
        """Every ratio of the platform; nan where a case is missing."""

        def fastest(names: tuple[str, ...]) -> float:
            seconds = [self.measurements[name].seconds for name in names if name in self.measurements]
            return min((s for s in seconds if not math.isnan(s)), default=math.nan)

        return {name: fastest(ratio.seconds_of) / fastest(ratio.over) for name, ratio in self.machine.ratios.items()}

    def _ask(self, measurement: Measurement, command: str, **arguments: Any) -> dict[str, Any] | None:
        """One case that cannot run does not cost the others their measurement."""
        if measurement.failure is not None:
            return None
        devices = measurement.case["ring_size"] * measurement.case["ulysses_size"]
        try:
            return self.workers.get(measurement.implementation, devices).ask(command, **arguments)
        except ValueError as error:
            measurement.failure = str(error)
            return None


def table_rows(benchmark: Benchmark) -> list[list[str]]:
    """The header and a row a case, as text."""
    unit, scale = ("TFLOP/s", 1e12) if benchmark.workers.platform == "gpu" else ("GFLOP/s", 1e9)
    rows = [[*COLUMNS, f"useful {unit}", "of GEMM peak", "MiB a device", "largest error"]]
    for name, measurement in benchmark.measurements.items():
        case = measurement.case
        definition = benchmark.config.definitions[name]
        ring = f"{case['ring_size']}x{case['ulysses_size']}" if case["ulysses_size"] > 1 else str(case["ring_size"])
        row = [name, measurement.implementation, case["strategy"] or "", case["layout"] or "", case["local"] or ""]
        row += [ring, f"{case['tokens']:,}", definition.mask, case["dtype"]]
        if measurement.failure is not None:
            rows.append([*row, *[""] * 6])
            continue
        memory, errors = measurement.temporary_bytes, measurement.errors
        rows.append(
            [
                *row,
                f"{statistics.median(measurement.forward_seconds):.3g}",
                f"{measurement.seconds:.3g}",
                f"{measurement.flops_per_second / scale:.1f}",
                f"{measurement.flops_per_second / benchmark.peak():.0%}",
                "" if memory is None else f"{memory / 2**20:.1f}",
                "" if errors is None else f"{max(errors.values()):.0e}",
            ]
        )
    return rows


def draw(benchmark: Benchmark) -> Figure:
    """Useful work a second of every case, beside the peak."""
    measured = {name: m for name, m in benchmark.measurements.items() if m.failure is None}
    figure = Figure(figsize=(7.2, 1.2 + 0.28 * len(measured)), layout="constrained")
    axes = figure.add_subplot()
    for name, measurement in measured.items():
        label = f"{name}, {measurement.case['tokens']:,} tokens"
        axes.barh(label, measurement.flops_per_second / 1e9, color=COLORS[measurement.implementation])
    axes.axvline(benchmark.peak() / 1e9, color="0.4", linestyle="--")
    axes.text(
        benchmark.peak() / 1e9, 1.0, "matrix product", transform=axes.get_xaxis_transform(), ha="right", va="bottom"
    )
    implementations = dict.fromkeys(measurement.implementation for measurement in measured.values())
    axes.legend(handles=[Patch(color=COLORS[name], label=name) for name in implementations], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("useful GFLOP/s, forward + backward")
    return figure


def write_results(benchmark: Benchmark, output: Path) -> None:
    """JSON with every single measurement, the table and the picture."""
    config, hello = benchmark.config, benchmark.workers.hello
    cases = []
    for name, measurement in benchmark.measurements.items():
        derived = {} if measurement.failure else {"useful_flops_per_second": measurement.flops_per_second}
        fields = dataclasses.asdict(measurement)
        cases.append({**fields.pop("case"), "mask": config.definitions[name].mask, **fields, **derived})
    summary = {
        "device": hello["device"],
        "cores": hello["cores"],
        "versions": benchmark.workers.versions(),
        "commit": git_commit(),
        "config": {**to_mapping(config), "definitions": None, "platforms": None},
        "rounds": benchmark.rounds,
        "gemm_flops_per_second": benchmark.gemm,
        # JSON has no nan
        "ratios": {name: None if math.isnan(value) else value for name, value in benchmark.ratios().items()},
        "cases": cases,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "results.json", json.dumps(summary, indent=2) + "\n")
    head, *body = table_rows(benchmark)
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *body)]
    write_whole(output / "table.md", "".join(f"| {line} |\n" for line in lines))
    with atomic_file(output / "speed.png", overwrite=True) as temporary:
        draw(benchmark).savefig(temporary, dpi=130)


def report(benchmark: Benchmark, output: Path, console: Console) -> None:
    """Prints the table, what could not be measured, and the ratios on the last line.

    Raises:
        ValueError: One of our own cases failed or is wrong.
    """
    # What the name of a case says already is left to table.md, which has no width.
    head, *body = [[row[0], *row[len(COLUMNS) - 2 :]] for row in table_rows(benchmark)]
    table = Table(Column(head[0], no_wrap=True), *head[1:], box=None)
    for row in body:
        table.add_row(*row)
    console.print(table)
    tolerance = benchmark.config.tolerance[benchmark.machine.dtype]
    broken = []
    for name, measurement in benchmark.measurements.items():
        error = max((measurement.errors or {"": 0.0}).values())
        complaint = measurement.failure
        if complaint is None and not error <= tolerance:  # nan is wrong too
            complaint = f"error {error:.1e} is above the tolerance {tolerance:.1e}"
        if complaint is not None:
            print(f"{name}: {complaint}")
            broken += [name] * (measurement.implementation == "ring_rl")
    print(f"results {output}")
    print(" ".join(f"{name}={value:.2f}" for name, value in benchmark.ratios().items()), flush=True)
    if broken:
        raise ValueError(f"ring_rl's own {', '.join(broken)} did not run or is wrong; the lines above say why")


def measure(config: BenchmarkConfig) -> None:
    """Runs the benchmark and writes its results; after Ctrl-C those of the rounds that are complete."""
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with contextlib.ExitStack() as stack:
        workers = Workers(config.platform)
        stack.callback(workers.close)
        output = config.output / workers.platform
        if not config.overwrite:
            refuse_existing(output, OUTPUTS)
        benchmark = Benchmark(config, workers)
        interrupted = False
        with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
            task = progress.add_task("starting", total=len(benchmark))
            try:
                for done, step in enumerate(benchmark.steps()):
                    progress.update(task, description=step, completed=done)
            except KeyboardInterrupt:
                if benchmark.rounds == 0:
                    raise KeyboardInterrupt("before the first round was complete; nothing is written") from None
                benchmark.drop_incomplete_round()
                interrupted = True
        write_results(benchmark, output)
        if interrupted:
            raise KeyboardInterrupt(f"{output} holds the {benchmark.rounds} rounds that were complete")
        report(benchmark, output, console)


@hydra.main(config_path="../conf", config_name="bench_kernels", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(BenchmarkConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
