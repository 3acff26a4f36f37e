"""Speed of new tokens against a cache, by the block that computes it; conf/bench_decoding.yaml documents every key."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from decoding_speed.cases import (
    Block,
    Measurement,
    ShapeConfig,
    blocks_for,
    cache_bytes,
    compile_block,
    exact_rows,
    relative_error,
    useful_flops,
)
from kernel_baselines.benchmark_worker import available_cores, seconds_per_call
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.nn.attention import FEW_TOKENS
from ring_rl.training.plots import write_figure
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.tables import csv_table, markdown_table

OUTPUTS = ("results.json", "decoding.csv", "table.md", "speed.png")
LABELS: dict[Block, str] = {
    "xla_whole": "xla, one product",
    "xla_tiles": "xla, tiles",
    "native_cpu": "native_cpu",
}
COLORS: dict[Block, str] = {"xla_whole": "tab:cyan", "xla_tiles": "tab:blue", "native_cpu": "tab:orange"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingBenchmarkConfig:
    """What is measured, how often, and where the results go."""

    shapes: dict[str, ShapeConfig]
    new_tokens: tuple[int, ...]
    filled: tuple[float, ...]
    dtype: dict[str, Literal["float32", "bfloat16"]]
    tolerance: dict[str, float]
    checked_tokens: int
    rounds: int
    at_least_seconds: float
    time_limit_seconds: float
    seed: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        for name, least in (("checked_tokens", 2), ("rounds", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("shapes", "new_tokens", "filled"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one entry")
        for name in ("new_tokens", "filled"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from one another, got {', '.join(map(str, values))}")
        if min(self.new_tokens) < 1:
            raise ValueError(f"new_tokens must be at least 1, got {min(self.new_tokens)}")
        if not all(0 < share <= 1 for share in self.filled):
            raise ValueError(
                f"filled must be shares above 0 and at most 1, got {', '.join(f'{share:g}' for share in self.filled)}"
            )
        for dtype in self.dtype.values():
            if dtype not in self.tolerance:
                raise ValueError(f"tolerance has no value for {dtype}, which dtype names; add tolerance.{dtype}")
        for name, shape in self.shapes.items():
            if (room := shape.filled_slots(min(self.filled))) < max(self.new_tokens):
                raise ValueError(
                    f"{max(self.new_tokens)} new tokens do not fit into the {room} slots of {name} that are filled at "
                    f"{min(self.filled):g}; use more slots or fewer new tokens"
                )


class Benchmark:
    """Compiles and checks all cases, and then measures them round by round."""

    def __init__(self, config: DecodingBenchmarkConfig) -> None:
        self.config, self.platform = config, jax.default_backend()
        if self.platform not in config.dtype:
            raise ValueError(f"dtype has no value for the platform {self.platform!r}; add dtype.{self.platform}")
        self.dtype = config.dtype[self.platform]
        self.rounds = 0
        self.measurements: list[Measurement] = []
        self.refusals: dict[Block, str] = {}
        self._calls: list[Callable[[], jax.Array]] = []

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the cache."""
        return jnp.dtype(self.dtype).itemsize

    def __len__(self) -> int:
        """Number of steps, as far as is known."""
        return len(self.config.shapes) * len(self.config.new_tokens) + self.config.rounds * len(self.measurements)

    def steps(self) -> Iterator[str]:
        """Does one piece of work after another; gives, before each, its name.

        Raises:
            ValueError: A result is wrong; nothing is measured then.
        """
        begin = time.perf_counter()
        generator = np.random.default_rng(self.config.seed)
        for name, shape in self.config.shapes.items():
            size = (shape.batch, shape.key_value_heads, shape.slots, shape.head_dim)
            k, v = (self._random(generator, size) for _ in range(2))
            on_device = tuple(map(jnp.asarray, (k, v)))
            for new_tokens in self.config.new_tokens:
                yield f"compile {name}, {new_tokens} new"
                q = self._random(generator, (shape.batch, new_tokens, shape.query_heads, shape.head_dim))
                self._prepare(name, q, (k, v), on_device)
        self._refuse_wrong()
        round_begin = time.perf_counter()
        for number in range(1, self.config.rounds + 1):
            for measurement, call in zip(self.measurements, self._calls, strict=True):
                yield f"round {number}: {measurement.shape}, {measurement.new_tokens} new, {measurement.block}"
                at_least = self.config.at_least_seconds
                seconds = seconds_per_call(call, jax.block_until_ready, at_least=at_least, in_flight=1)
                measurement.seconds.append(seconds)
            self.rounds = number
            now = time.perf_counter()
            if now - begin + (now - round_begin) > self.config.time_limit_seconds:
                return
            round_begin = now

    def drop_incomplete_round(self) -> None:
        """Forgets what was measured after the last complete round."""
        for measurement in self.measurements:
            del measurement.seconds[self.rounds :]

    def _prepare(
        self, name: str, q: np.ndarray, cache: tuple[np.ndarray, np.ndarray], on_device: tuple[jax.Array, ...]
    ) -> None:
        new_tokens, shape = q.shape[1], self.config.shapes[name]
        operands = (jnp.asarray(q), *on_device)
        programs = {}
        for block in blocks_for(new_tokens, self.platform):
            try:
                programs[block] = compile_block(block, *operands)
            except ValueError as error:
                if block != "native_cpu":  # XLA's serves everything
                    raise
                self.refusals[block] = str(error)
        tokens = np.unique(np.linspace(0, new_tokens - 1, self.config.checked_tokens, dtype=int))
        for share in self.config.filled:
            length = shape.filled_slots(share) - new_tokens
            exact = exact_rows(q, *cache, length=length, tokens=tokens)
            for block, program in programs.items():
                call = partial(program, *operands, length=jnp.int32(length))
                error = relative_error(np.asarray(call())[:, tokens], exact)
                self.measurements.append(
                    Measurement(shape=name, new_tokens=new_tokens, filled=share, block=block, error=error)
                )
                self._calls.append(call)

    def _random(self, generator: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
        return generator.standard_normal(size, dtype=np.float32).astype(jnp.dtype(self.dtype))

    def _refuse_wrong(self) -> None:
        tolerance = self.config.tolerance[self.dtype]
        wrong = [m for m in self.measurements if not m.error <= tolerance]  # nan is wrong too
        if wrong:
            said = (f"{m.block} on {m.shape}, {m.new_tokens} new, {m.filled:.0%} filled: {m.error:.1e}" for m in wrong)
            raise ValueError(f"errors above the tolerance of {tolerance:.1e}, so nothing is timed: {'; '.join(said)}")


def by_case(measurements: Sequence[Measurement]) -> dict[tuple[str, int, float], dict[Block, Measurement]]:
    """The blocks of every case."""
    cases: dict[tuple[str, int, float], dict[Block, Measurement]] = {}
    for each in measurements:
        cases.setdefault(each.case, {})[each.block] = each
    return cases


def speedup(blocks: Mapping[Block, Measurement]) -> float:
    """Seconds of the faster of XLA's over those of the C++ block; nan where that is not."""
    if "native_cpu" not in blocks:
        return math.nan
    return min(each.median for name, each in blocks.items() if name != "native_cpu") / blocks["native_cpu"].median


def speedups(measurements: Sequence[Measurement]) -> dict[str, float]:
    """Medians over the shapes, of one new token and of the most, in the fullest cache and in the emptiest.

    nan where it was not measured, and for the most new tokens if they are few.
    """
    cases = by_case(measurements)
    counts, shares = ({each.new_tokens for each in measurements}, {each.filled for each in measurements})
    chunk = max(counts) if max(counts) > FEW_TOKENS else None

    def median(count: int | None, share: float) -> float:
        found = [speedup(blocks) for (_, *rest), blocks in cases.items() if rest == [count, share]]
        return statistics.median(found) if found else math.nan

    return {
        "one_token_speedup": median(1, max(shares)),
        "chunk_speedup": median(chunk, max(shares)),
        "one_token_speedup_least_filled": median(1, min(shares)),
        "chunk_speedup_least_filled": median(chunk, min(shares)),
    }


def records(shapes: Mapping[str, ShapeConfig], measurements: Sequence[Measurement], itemsize: int) -> list[dict]:
    """What every block took on every case, and what that makes of the machine."""

    def record(each: Measurement) -> dict:
        shape = shapes[each.shape]
        filled_slots = shape.filled_slots(each.filled)
        return {
            "shape": each.shape,
            "new_tokens": each.new_tokens,
            "filled": each.filled,
            "filled_slots": filled_slots,
            "block": each.block,
            "milliseconds": 1e3 * each.median,
            "cache_gigabytes_per_second": cache_bytes(shape, filled_slots, itemsize) / each.median / 1e9,
            "useful_gigaflops_per_second": useful_flops(shape, filled_slots, each.new_tokens) / each.median / 1e9,
            "error": each.error,
        }

    return [record(each) for each in measurements]


def table_rows(
    shapes: Mapping[str, ShapeConfig], measurements: Sequence[Measurement], itemsize: int
) -> list[list[str]]:
    """The header and a row a case, as text: the cache's bytes a second for few new tokens, FLOPs for many."""
    head = ["shape", "new tokens", "filled", *(f"{label}, ms" for label in LABELS.values()), "xla / native"]
    rows = [[*head, "fastest: GB/s of the cache", "fastest: useful GFLOP/s"]]
    for (name, new_tokens, filled), blocks in by_case(measurements).items():
        ratio = speedup(blocks)
        fastest = min(blocks.values(), key=lambda each: each.median)
        figures = records(shapes, [fastest], itemsize)[0]
        few = new_tokens <= FEW_TOKENS
        rows.append(
            [
                f"{name}: {shapes[name]}",
                str(new_tokens),
                f"{filled:.0%}",
                *(_digits(1e3 * blocks[block].median) if block in blocks else "" for block in LABELS),
                "" if math.isnan(ratio) else f"{ratio:.2f}",
                _digits(figures["cache_gigabytes_per_second"]) if few else "",
                "" if few else _digits(figures["useful_gigaflops_per_second"]),
            ]
        )
    return rows


def draw(shapes: Mapping[str, ShapeConfig], measurements: Sequence[Measurement]) -> Figure:
    """Milliseconds of every block, a panel a shape."""
    figure = Figure(figsize=(4.2 * len(shapes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    used: list[Block] = [block for block in LABELS if any(each.block == block for each in measurements)]
    width = 0.8 / len(used)
    for axes, (name, shape) in zip(panels, shapes.items(), strict=True):
        cases = {case: blocks for case, blocks in by_case(measurements).items() if case[0] == name}
        for offset, block in enumerate(used):
            there = [(i, blocks[block].median) for i, blocks in enumerate(cases.values()) if block in blocks]
            places = [i + (offset - (len(used) - 1) / 2) * width for i, _ in there]
            axes.bar(places, [1e3 * each for _, each in there], width, color=COLORS[block], label=LABELS[block])
        labels = [f"{new_tokens}\n{filled:.0%}" for _, new_tokens, filled in cases]
        axes.set_xticks(range(len(cases)), labels, fontsize="small")
        axes.set_yscale("log")
        axes.set_title(f"{name}: {shape}", fontsize="small")
        axes.set_xlabel("new tokens, share of the cache that is filled")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize="small")
    return figure


def write_results(benchmark: Benchmark, output: Path) -> None:
    """JSON with every single measurement, CSV, the table and the picture."""
    config, measurements = benchmark.config, benchmark.measurements
    summary = {
        # JSON has no nan
        **{name: None if math.isnan(value) else value for name, value in speedups(measurements).items()},
        "dtype": benchmark.dtype,
        "rounds": benchmark.rounds,
        "refusals": benchmark.refusals,
        "measurements": [dataclasses.asdict(each) for each in measurements],
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "cores": available_cores(),
        "versions": versions("ring_rl", "jax", "jaxlib", "numpy"),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "results.json", json.dumps(summary, indent=2) + "\n")
    write_whole(output / "decoding.csv", csv_table(records(config.shapes, measurements, benchmark.itemsize)))
    write_whole(output / "table.md", markdown_table(table_rows(config.shapes, measurements, benchmark.itemsize)))
    write_figure(draw(config.shapes, measurements), output / "speed.png")


def report(benchmark: Benchmark, output: Path, console: Console) -> None:
    """Prints the table, which blocks there are not, and the speedups on the last line."""
    # The sizes of a shape and the figures that follow from its times are left to table.md, which has no width.
    rows = table_rows(benchmark.config.shapes, benchmark.measurements, benchmark.itemsize)
    head, *body = [[row[0].split(":")[0], *row[1:-2]] for row in rows]
    table = Table(Column(head[0], min_width=max(len(row[0]) for row in body)), box=None)
    for name in head[1:]:
        table.add_column(name, min_width=max(map(len, name.split())))
    for row in body:
        table.add_row(*row)
    console.print(table)
    for block, refusal in benchmark.refusals.items():
        print(f"without {block}: {refusal}")
    print(f"results {output}")
    print(" ".join(f"{name}={value:.2f}" for name, value in speedups(benchmark.measurements).items()), flush=True)


def measure(config: DecodingBenchmarkConfig) -> None:
    """Runs the benchmark and writes its results; after Ctrl-C those of the rounds that are complete."""
    console = Console()
    output = config.output / jax.default_backend()
    if not config.overwrite:
        refuse_existing(output, OUTPUTS)
    benchmark = Benchmark(config)
    interrupted = False
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=len(benchmark))
        try:
            for done, step in enumerate(benchmark.steps()):
                progress.update(task, description=step, completed=done, total=len(benchmark))
        except KeyboardInterrupt:
            if benchmark.rounds == 0:
                raise KeyboardInterrupt("before the first round was complete; nothing is written") from None
            benchmark.drop_incomplete_round()
            interrupted = True
    write_results(benchmark, output)
    if interrupted:
        raise KeyboardInterrupt(f"{output} holds the {benchmark.rounds} rounds that were complete")
    report(benchmark, output, console)


def _digits(value: float) -> str:
    """Three of them, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@hydra.main(config_path="../conf", config_name="bench_decoding", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(DecodingBenchmarkConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
