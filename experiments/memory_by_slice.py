"""Compiled memory of a device as ring and context grow together; conf/memory_by_slice.yaml documents every key."""

import dataclasses
import json
import statistics
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import hydra
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.planning.attentions import AttentionVariant, StepSettings, step_request
from ring_rl.planning.compile_process import CompileProcesses, compiler_versions, key_of, remembered
from ring_rl.planning.compiled_step import CompiledMemory, StepRequest
from ring_rl.planning.forecast import duration
from ring_rl.planning.probe_cache import ProbeCache, open_probe_cache
from ring_rl.planning.topology import Machine, machine_named, require_libtpu
from ring_rl.training.provenance import git_commit, versions
from ring_rl.training.tables import csv_table, markdown_table

OUTPUTS = ("memory.csv", "table.md", "memory.png", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """What is compiled, for which machines."""

    machines: tuple[str, ...]
    tokens_a_device: int
    variant: AttentionVariant
    transformer: TransformerConfig
    settings: StepSettings
    processes: int
    expected_seconds: float
    probes: Path
    output: Path
    dry_run: bool
    overwrite: bool

    def __post_init__(self) -> None:
        devices = [machine_named(name).devices for name in self.machines]
        if len(devices) < 2 or devices != sorted(set(devices)):
            raise ValueError(f"machines must be at least two, smallest first, got {', '.join(self.machines)}")
        if self.variant.sequence_devices is not None:
            raise ValueError("variant.sequence_devices must be null: only then does context grow with the devices")
        for count in devices:
            # Otherwise the model would be widened, and slices would hold different models.
            if self.transformer.width % count:
                raise ValueError(
                    f"transformer.width={self.transformer.width} is not a multiple of {count} devices; "
                    "choose another model, or smaller machines"
                )
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")

    def request(self, machine: Machine) -> StepRequest:
        """The training step on a machine."""
        return step_request(
            self.variant,
            self.transformer,
            self.settings,
            devices=machine.devices,
            estimated=machine.estimated,
            tokens_a_device=self.tokens_a_device,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A machine. `peak_bytes` is None where the compiler refused; seconds are those of when it was compiled."""

    machine: str
    devices: int
    context: int
    peak_bytes: int | None
    state_bytes: int
    compile_seconds: float

    @property
    def other_bytes(self) -> int | None:
        """All but parameters and moments."""
        return None if self.peak_bytes is None else self.peak_bytes - self.state_bytes


def measure(config: SliceConfig) -> list[Row] | None:
    """Compiles what is not known, reports; None if it was only to say what is left.

    Raises:
        ImportError: A TPU slice is left, and libtpu is not installed.
        FileExistsError: There are results already, or another process adds to the file of probes.
    """
    if not (config.overwrite or config.dry_run):
        refuse_existing(config.output, OUTPUTS)
    machines = [machine_named(name) for name in config.machines]
    console = Console()
    with open_probe_cache(config.probes) as cache:
        known = {
            machine.name: probe.memory
            for machine in machines
            if (probe := cache.get(key_of(config.request(machine), machine))) is not None
        }
        left = [machine for machine in machines if machine.name not in known]
        console.print(describe(config, known, len(left)), soft_wrap=True, highlight=False)
        if config.dry_run:
            return None
        if any(not machine.estimated for machine in left):
            require_libtpu()
        known |= compile_left(config, left, cache, console)
    rows = [
        Row(
            machine=machine.name,
            devices=machine.devices,
            context=machine.devices * config.tokens_a_device,
            peak_bytes=known[machine.name].peak_bytes,
            state_bytes=known[machine.name].state_bytes,
            compile_seconds=known[machine.name].lower_seconds + known[machine.name].compile_seconds,
        )
        for machine in machines
    ]
    write_results(config, rows)
    table = Table(*table_rows(rows)[0])
    for line in table_rows(rows)[1:]:
        table.add_row(*line)
    console.print(table)
    return rows


def describe(config: SliceConfig, known: dict[str, CompiledMemory], left: int) -> str:
    """What is left before anything is begun, in a line."""
    if not left:
        return f"all {len(known)} machines are known from {config.probes}; nothing is compiled"
    timed = [memory.lower_seconds + memory.compile_seconds for memory in known.values()]
    seconds = left * (statistics.median(timed) if timed else config.expected_seconds) / min(config.processes, left)
    source = "those known" if timed else "expected_seconds"
    return f"{left} of {len(known) + left} machines are left: about {duration(seconds)}, by {source}"


def compile_left(
    config: SliceConfig, machines: list[Machine], cache: ProbeCache, console: Console
) -> dict[str, CompiledMemory]:
    """Asks the compilers, each answer on disk as soon as it is there."""
    found: dict[str, CompiledMemory] = {}
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        ThreadPoolExecutor(config.processes) as pool,
        # Left first: an interrupted run ends its compilers, and then its threads.
        CompileProcesses() as processes,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        bar = progress.add_task("", total=len(machines))
        asked = {
            pool.submit(remembered, config.request(machine), machine, cache=cache, processes=processes): machine
            for machine in machines
        }
        try:
            for answer in as_completed(asked):
                name, memory = asked[answer].name, answer.result()
                found[name] = memory
                size = "refused" if memory.peak_bytes is None else f"{memory.peak_bytes / 1e9:.3f} GB"
                seconds = memory.lower_seconds + memory.compile_seconds
                console.print(f"{name}: {size} ({duration(seconds)})", highlight=False)
                progress.advance(bar)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return found


def growth(rows: list[Row], *, with_state: bool) -> float | None:
    """The most of any machine over the least; None where a compiler refused."""
    sizes = [row.peak_bytes if with_state else row.other_bytes for row in rows]
    whole = [size for size in sizes if size is not None]
    return max(whole) / min(whole) if len(whole) == len(sizes) else None


def table_rows(rows: list[Row]) -> list[list[str]]:
    """The header and a line a machine, as text."""
    lines = [["machine", "ring", "context", "GB a device", "of it parameters and moments", "compiled in"]]
    for row in rows:
        peak = "refused" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.3f}"
        state, seconds = f"{row.state_bytes / 1e9:.3f}", duration(row.compile_seconds)
        lines.append([row.machine, str(row.devices), f"{row.context:,}", peak, state, seconds])
    return lines


def draw(config: SliceConfig, rows: list[Row]) -> Figure:
    """Peak and what of it is not state, over the devices."""
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row.peak_bytes is not None]
    devices = [row.devices for row in shown]
    for label, sizes, style in (
        ("all", [row.peak_bytes for row in shown], "o-"),
        ("without parameters and moments", [row.other_bytes for row in shown], "s--"),
    ):
        axes.plot(devices, [(size or 0) / 1e9 for size in sizes], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [f"{row.devices}\n{row.context // 1024:,}K" for row in shown])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("devices in the ring, and tokens of the one sequence")
    axes.set_ylabel("GB a device, compiled training step")
    axes.set_title(f"{config.tokens_a_device:,} tokens a device")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write_results(config: SliceConfig, rows: list[Row]) -> None:
    """CSV, table, picture and provenance, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "memory.csv", csv_table([dataclasses.asdict(row) for row in rows]))
    write_whole(config.output / "table.md", markdown_table(table_rows(rows)))
    with atomic_file(config.output / "memory.png", overwrite=True) as temporary:
        draw(config, rows).savefig(temporary, dpi=130)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output), "probes": str(config.probes)},
        "growth": growth(rows, with_state=True),
        "growth_without_state": growth(rows, with_state=False),
        "commit": git_commit(),
        "versions": {**versions("ring_rl", "flax"), **compiler_versions()},
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def last_line(rows: list[Row]) -> str:
    """name=value: by how much memory differs between machines, and how much the context grew."""
    figures = [f"context_growth={rows[-1].context / rows[0].context:g}"]
    for name, with_state in (("growth", True), ("growth_without_state", False)):
        value = growth(rows, with_state=with_state)
        figures.append(f"{name}={'refused' if value is None else f'{value:.3f}'}")
    return " ".join(figures)


@hydra.main(config_path="../conf", config_name="memory_by_slice", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        rows = measure(from_mapping(SliceConfig, resolve(cfg)))
        if rows is not None:
            print(last_line(rows))


if __name__ == "__main__":
    run_entry_point(main)
