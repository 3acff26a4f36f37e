"""Compiled activations of one layer beside the paper's table 1; conf/layer_memory.yaml documents every key."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import jax
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.cost_paper import ARCHITECTURES, Architecture, layer_activations
from ring_rl.nn.transformer_config import ComputeDtype
from ring_rl.planning.compiled_step import AttentionBlock
from ring_rl.planning.layer_activations import (
    DIRECTIONS,
    PARTS,
    Direction,
    LayerMemory,
    LayerProgram,
    LayerShape,
    Part,
    compile_layer,
    program_of,
)
from ring_rl.planning.topology import devices_of, tpu_slice
from ring_rl.training.mesh import request_virtual_devices
from ring_rl.training.provenance import git_commit, versions
from ring_rl.training.tables import csv_table, markdown_table

OUTPUTS = ("memory.csv", "table.md", "memory.png", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMemoryConfig:
    """What is compiled, and for which machine."""

    machine: str
    devices: int
    dtype: ComputeDtype
    attention_block: AttentionBlock
    heads_at_once: int | None
    tokens: int
    dense_tokens: int
    width: int
    heads: int
    block_size: int
    feed_forward_chunks: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if self.devices < 2:
            raise ValueError(f"devices must be at least 2 for a ring, got {self.devices}")
        if self.machine != "cpu" and tpu_slice(self.machine).chips != self.devices:
            raise ValueError(f"machine={self.machine} has {tpu_slice(self.machine).chips} chips, not {self.devices}")

    def shape(self, architecture: Architecture) -> LayerShape:
        """One layer on one device."""
        return LayerShape(
            tokens=self.dense_tokens if architecture == "vanilla" else self.tokens,
            width=self.width,
            heads=self.heads,
            block_size=self.block_size,
            feed_forward_chunks=self.feed_forward_chunks,
            dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture in one direction; bytes on one device.

    Attributes:
        architecture: A row of the paper's table.
        direction: Forward, or forward and backward.
        tokens: On the device.
        attention_bytes: Compiled.
        feed_forward_bytes: Compiled.
        paper_bytes: The larger of the table's two entries, for elements of this size.
        ring_of_one_bytes: What the table says of a ring whose devices hold so many tokens.
    """

    architecture: Architecture
    direction: Direction
    tokens: int
    attention_bytes: int
    feed_forward_bytes: int
    paper_bytes: int
    ring_of_one_bytes: int

    @property
    def total_bytes(self) -> int:
        """The larger part: recomputed apart, they do not live at once."""
        return max(self.attention_bytes, self.feed_forward_bytes)

    @property
    def of_paper(self) -> float:
        """Compiled over printed formula. Rows with the same have the table's ratio to one another."""
        return self.total_bytes / self.paper_bytes

    @property
    def of_ring_of_one(self) -> float:
        """Compiled over the formula of the ring's row."""
        return self.total_bytes / self.ring_of_one_bytes


def compiled(config: LayerMemoryConfig) -> tuple[list[Row], float]:
    """Every row, each program compiled once, and the seconds that all compilations took."""
    if config.machine == "cpu":
        request_virtual_devices(config.devices)
        devices: Sequence[Any] = jax.devices("cpu")[: config.devices]
    else:
        devices = devices_of(tpu_slice(config.machine))
    wanted: dict[tuple[Architecture, Direction, Part], LayerProgram] = {
        (architecture, direction, part): program_of(
            architecture, part=part, direction=direction, tokens=config.shape(architecture).tokens
        )
        for direction in DIRECTIONS
        for architecture in ARCHITECTURES
        for part in PARTS
    }
    done: dict[LayerProgram, LayerMemory] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(set(wanted.values())))
        for (architecture, direction, part), program in wanted.items():
            if program in done:
                continue
            progress.update(bar, description=f"{architecture}, {part}, {direction}")
            shape = config.shape(architecture)
            done[program] = compile_layer(
                program,
                shape,
                devices,
                attention_block=config.attention_block,
                heads_at_once=config.heads_at_once,
            )
            progress.advance(bar)
    rows = []
    for direction in DIRECTIONS:
        for architecture in ARCHITECTURES:
            attention, feed_forward = (done[wanted[architecture, direction, part]].activation_bytes for part in PARTS)
            shape = config.shape(architecture)
            rows.append(
                Row(
                    architecture=architecture,
                    direction=direction,
                    tokens=shape.tokens,
                    attention_bytes=attention,
                    feed_forward_bytes=feed_forward,
                    paper_bytes=paper_bytes(architecture, shape),
                    ring_of_one_bytes=paper_bytes("ring", shape),
                )
            )
    return rows, sum(memory.compile_seconds for memory in done.values())


def paper_bytes(architecture: Architecture, shape: LayerShape) -> int:
    """Table 1's total; it is for elements of two bytes."""
    block = shape.tokens if architecture == "ring" else min(shape.block_size, shape.tokens)
    printed = layer_activations(
        architecture, batch=1, tokens=shape.tokens, model_width=shape.width, heads=shape.heads, block_size=block
    )
    return printed.total * shape.element_bytes // 2


def deviation(rows: list[Row], row: Row, *, as_ring: bool = False) -> float:
    """By how much the row's ratio to the ring's row is another than the table's; 0 is the same.

    With `as_ring` the row is held against the formula of the ring's row, at its own tokens.
    """
    ring = next(other for other in rows if other.architecture == "ring" and other.direction == row.direction)
    return (row.of_ring_of_one if as_ring else row.of_paper) / ring.of_paper - 1


def arrays(config: LayerMemoryConfig, row: Row, size: int) -> str:
    """Bytes in arrays of s x h, or for scores of n x s x s."""
    element = config.shape(row.architecture).element_bytes
    scores = config.heads * row.tokens**2 * element
    if row.architecture == "vanilla" and size >= scores:
        return f"{size / scores:.2f} n s²"
    return f"{size / (row.tokens * config.width * element):.2f} s h"


def table_rows(config: LayerMemoryConfig, rows: list[Row]) -> list[list[str]]:
    """The header and a line a row, as text."""
    lines = [
        [
            "architecture",
            "direction",
            "tokens a device",
            "attention, elements",
            "feed-forward, elements",
            "total, MB",
            "table 1, elements",
            "compiled / table 1",
            "ratio to the ring's row, off table 1 by",
            "counted as the ring's row, off by",
        ]
    ]
    for row in rows:
        blockwise = row.architecture == "blockwise_transformer"
        lines.append(
            [
                row.architecture.replace("_", " "),
                row.direction,
                f"{row.tokens:,}",
                arrays(config, row, row.attention_bytes),
                arrays(config, row, row.feed_forward_bytes),
                f"{row.total_bytes / 1e6:,.0f}",
                arrays(config, row, row.paper_bytes),
                f"{row.of_paper:.2f}",
                "" if row.architecture == "ring" else f"{deviation(rows, row):+.0%}",
                f"{deviation(rows, row, as_ring=True):+.0%}" if blockwise else "",
            ]
        )
    return lines


def draw(rows: list[Row]) -> Figure:
    """Compiled over printed, a group a direction."""
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, architecture in enumerate(ARCHITECTURES):
        own = [row for row in rows if row.architecture == architecture]
        bars = axes.bar(
            [j + 0.2 * (i - 1.5) for j in range(len(own))],
            [row.of_paper for row in own],
            width=0.19,
            label=architecture.replace("_", " "),
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    for row in rows:
        if row.architecture == "ring":
            j = DIRECTIONS.index(row.direction)
            axes.fill_between([j - 0.45, j + 0.45], 0.75 * row.of_paper, 1.25 * row.of_paper, color="0.85", zorder=0)
    axes.set_xticks(range(len(DIRECTIONS)), DIRECTIONS)
    axes.set_ylabel("compiled / table 1")
    axes.set_title("bars of one height have the table's ratios; band: ring's row ± 25%", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def write_results(config: LayerMemoryConfig, rows: list[Row], seconds: float) -> None:
    """CSV, table, picture and provenance, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "memory.csv", csv_table([dataclasses.asdict(row) for row in rows]))
    write_whole(config.output / "table.md", markdown_table(table_rows(config, rows)))
    with atomic_file(config.output / "memory.png", overwrite=True) as temporary:
        draw(rows).savefig(temporary, dpi=130)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "compile_seconds": round(seconds, 1),
        "commit": git_commit(),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax", *(() if config.machine == "cpu" else ("libtpu",))),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def measure(config: LayerMemoryConfig) -> list[Row]:
    """Compiles every program and reports."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    rows, seconds = compiled(config)
    write_results(config, rows, seconds)
    lines = table_rows(config, rows)
    table = Table(*lines[0])
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=max(140, Console().width)).print(table)
    return rows


def last_line(rows: list[Row]) -> str:
    """name=value: how far ratios to the ring's row are off the table's, with blockwise as it is and counted alike."""
    figures = []
    for direction in DIRECTIONS:
        own = [row for row in rows if row.direction == direction and row.architecture != "ring"]
        for row in own:
            figures.append(f"{direction}_{row.architecture}_off={deviation(rows, row):+.3f}")
            if row.architecture == "blockwise_transformer":
                figures.append(f"{direction}_{row.architecture}_as_ring_off={deviation(rows, row, as_ring=True):+.3f}")
    return " ".join(figures)


@hydra.main(config_path="../conf", config_name="layer_memory", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        print(last_line(measure(from_mapping(LayerMemoryConfig, resolve(cfg)))))


if __name__ == "__main__":
    run_entry_point(main)
