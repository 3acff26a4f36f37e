"""Whether a ring's transfers hide behind its blocks, read from programs compiled for TPUs that are not here.

conf/check_overlap.yaml documents every key.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels import attention
from ring_rl.kernels.layout import Layout
from ring_rl.kernels.local.block import LocalBlock
from ring_rl.kernels.local.pallas_tpu import PallasTpuBlock
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.schedule import Permute, Schedule
from ring_rl.planning.topology import describe_topology
from ring_rl.training.provenance import git_commit, versions
from ring_rl.training.tables import csv_table

OUTPUTS = ("permutes.csv", "timeline.png", "summary.json")
AXIS = "sp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """What is compiled, and for which machines."""

    topologies: tuple[str, ...]
    tokens_per_device: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    dtype: Literal["bfloat16", "float32"]
    causal: bool
    layout: Layout
    local: Literal["pallas_tpu", "xla"]
    block_size: int
    heads_at_once: int | None
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.topologies:
            raise ValueError("topologies must name at least one machine, such as v5e:2x4")

    def block(self) -> LocalBlock:
        """The local block, compiled for a machine that is not here."""
        if self.local == "xla":
            return XlaBlock(block_size=self.block_size)
        return PallasTpuBlock(block_size=self.block_size, cross_compile=True)


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program and its permutes."""

    topology: str
    direction: Literal["forward", "backward"]
    schedule: Schedule
    permutes: list[Permute]
    peak_bytes: int


def compile_ring(config: OverlapConfig, topology: str) -> list[Program]:
    """Forward and backward of ring attention over all devices of a topology, each a program of its own."""
    mesh = DeviceMesh(np.array(describe_topology(topology)), (AXIS,))
    spec = PartitionSpec(None, AXIS)
    mask, block = Mask(causal=config.causal), config.block()

    def attend(q, k, v):
        how = {"layout": config.layout, "strategy": "ring", "heads_at_once": config.heads_at_once}
        return attention(q, k, v, mask=mask, axis_name=AXIS, local=block, **how).out

    over_devices = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    tokens, sharding = config.tokens_per_device * mesh.size, NamedSharding(mesh, spec)
    operand = lambda heads: jax.ShapeDtypeStruct(  # noqa: E731
        (1, tokens, heads, config.head_dim), jnp.dtype(config.dtype), sharding=sharding
    )
    q, k = operand(config.query_heads), operand(config.key_value_heads)
    # Apart, so that neither program borrows the other's work to hide a transfer.
    forward = jax.jit(lambda *qkv: jax.vjp(over_devices, *qkv)).lower(q, k, k)
    compiled_forward = forward.compile()
    _, pullback = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        forward.out_info,
        compiled_forward.output_shardings,
    )
    compiled_backward = jax.jit(lambda pullback, d_out: pullback(d_out)).lower(pullback, q).compile()
    return [
        _read(topology, "forward", compiled_forward),
        _read(topology, "backward", compiled_backward),
    ]


def _read(topology: str, direction: Literal["forward", "backward"], compiled: jax.stages.Compiled) -> Program:
    schedule = Schedule.parse(compiled.as_text() or "")
    analysis = compiled.memory_analysis()
    peak = 0 if analysis is None else int(analysis.peak_memory_in_bytes)
    return Program(topology, direction, schedule, schedule.permutes(), peak)


def permute_rows(programs: list[Program]) -> list[dict[str, str | int]]:
    """One row a permute, for the CSV and the table."""
    return [
        {
            "topology": program.topology,
            "direction": program.direction,
            "permute": permute.name,
            "runs": "?" if permute.trips is None else permute.trips,
            "array": permute.array,
            "bytes": permute.bytes,
            "asynchronous": "yes" if permute.asynchronous else "NO",
            "covered_by": len(permute.covered_by),
            "overlapped": "yes" if permute.overlapped else "NO",
        }
        for program in programs
        for permute in program.permutes
    ]


def draw(programs: list[Program]) -> Figure:
    """One strip a computation with permutes: kernels in the order in which they run, and transfers above them."""
    strips = [
        (program, name)
        for program in programs
        for name in dict.fromkeys(permute.computation for permute in program.permutes)
    ]
    figure = Figure(figsize=(9.0, 0.4 + 0.9 * max(1, len(strips))), layout="constrained")
    panels = figure.subplots(max(1, len(strips)), 1, squeeze=False)[:, 0]
    for axes, (program, name) in zip(panels, strips, strict=False):
        lines = program.schedule.computations[name]
        permutes = [permute for permute in program.permutes if permute.computation == name]
        # Only what multiplies or transfers is drawn, one unit each.
        starts = {permute.name: permute for permute in permutes}
        transfers, clock = {}, 0
        for line in lines:
            done = next(
                (start for start in starts if line.opcode.endswith("-done") and f"%{start})" in line.text), None
            )
            if line.name in starts:
                transfers[line.name] = [clock, clock]
                clock += 0.3
            elif done is not None:
                transfers[done][1] = clock + 0.3
                clock += 0.3
            elif program.schedule.multiplies(line):
                axes.broken_barh([(clock, 0.95)], (0, 0.8), color="0.55")
                clock += 1
        for height, (start, (begin, end)) in enumerate(transfers.items()):
            color = "tab:green" if starts[start].overlapped else "tab:red"
            axes.broken_barh([(begin, max(end - begin, 0.1))], (1 + 0.5 * (height % 2), 0.4), color=color)
        trips = permutes[0].trips
        where = "" if trips == 1 else f"\nloop, {'?' if trips is None else trips} times"
        axes.set_ylabel(
            f"{program.topology}\n{program.direction}{where}", rotation=0, ha="right", va="center", fontsize=7
        )
        axes.set_ylim(-0.1, 2.1)
        axes.set_yticks([])
        axes.set_xticks([])
    figure.suptitle(
        "in order: grey multiplies matrices, green is a transfer under way, red one that nothing hides", size=8
    )
    return figure


def write_results(config: OverlapConfig, programs: list[Program]) -> None:
    """The table as CSV, the picture, and what they were made of."""
    config.output.mkdir(parents=True, exist_ok=True)
    rows = permute_rows(programs)
    write_whole(config.output / "permutes.csv", csv_table(rows))
    with atomic_file(config.output / "timeline.png", overwrite=True) as temporary:
        draw(programs).savefig(temporary, dpi=130)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "permutes": len(rows),
        "asynchronous": sum(row["asynchronous"] == "yes" for row in rows),
        "overlapped": sum(row["overlapped"] == "yes" for row in rows),
        "peak_bytes": {f"{p.topology} {p.direction}": p.peak_bytes for p in programs},
        "commit": git_commit(),
        "versions": versions("ring_rl", "jax", "jaxlib", "libtpu"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def check(config: OverlapConfig) -> bool:
    """Compiles, reports, and says whether every permute is hidden."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    console, programs = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=len(config.topologies))
        for topology in config.topologies:
            progress.update(task, description=f"compiling for {topology}")
            programs += compile_ring(config, topology)
            progress.advance(task)
    rows = permute_rows(programs)
    if not rows:
        raise ValueError("the programs have no collective permute: a ring of one device sends nothing")
    write_results(config, programs)
    shown = ("topology", "direction", "runs", "array", "asynchronous", "covered_by", "overlapped")
    table = Table("topology", "direction", "runs", "array", "async", "covers", "hidden")
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    console.print(table)
    overlapped = sum(row["overlapped"] == "yes" for row in rows)
    print(f"permutes={len(rows)} overlapped={overlapped}")
    return overlapped == len(rows)


@hydra.main(config_path="../conf", config_name="check_overlap", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a check."""
    with exit_on_bad_input():
        hidden = check(from_mapping(OverlapConfig, resolve(cfg)))
    if not hidden:
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)
