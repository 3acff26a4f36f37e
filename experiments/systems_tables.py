"""Tables 2 and 4 and figure 5 of Ring Attention by formula; conf/systems_tables.yaml documents every key."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.hardware import HARDWARE
from ring_rl.planning.paper_tables import (
    DataSetConfig,
    FlopsRatio,
    GrowthConfig,
    Overlap,
    OverlapConfig,
    flops_ratios,
    growth_rows,
    overlap_rows,
)
from ring_rl.training.provenance import git_commit, versions
from ring_rl.training.tables import csv_table, markdown_table

TABLES = ("overlap", "flops", "growth")
OUTPUTS = (
    *(f"{name}.{kind}" for name in TABLES for kind in ("csv", "md")),
    "overlap.png",
    "flops.png",
    "summary.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """All three."""

    overlap: OverlapConfig
    data_set: DataSetConfig
    growth: GrowthConfig
    output: Path
    overwrite: bool


def as_text(config: TablesConfig, tables: dict[str, Sequence[Any]]) -> dict[str, list[list[str]]]:
    """Each table as a header and lines."""
    thousands = lambda tokens: "" if tokens is None else f"{tokens / 1e3:,.1f}"  # noqa: E731
    overlap = config.overlap
    group = overlap.query_heads // overlap.grouped_key_value_heads
    lines = {
        "overlap": [
            [
                "device",
                "TFLOP/s",
                "GB/s one way",
                "links",
                "block F/B, thousand tokens",
                "in the paper",
                "sequence 6 F/B",
                "in the paper",
                "one link to the next device",
                "causal zigzag, backward",
                f"and {group} queries a key",
            ]
        ]
    }
    for row in tables["overlap"]:
        lines["overlap"].append(
            [
                row.hardware,
                f"{row.teraflops:,.0f}",
                f"{row.gigabytes_per_second:g}",
                str(row.links),
                *map(thousands, (row.block, row.printed_block, row.sequence, row.printed_sequence)),
                *map(thousands, (row.one_link, row.training, row.grouped)),
            ]
        )
    counts = [multiple * config.data_set.reference_tokens for multiple in config.data_set.multiples]
    lines["flops"] = [["model", "width", *map(short, counts)]]
    for model, width in config.data_set.widths.items():
        cells = [cell for cell in tables["flops"] if cell.model == model]
        shown = [
            f"{cell.ratio:.1f}" + (f" ({cell.printed:.1f})" if differs(cell.ratio, cell.printed) else "")
            for cell in cells
        ]
        lines["flops"].append([model, str(width), *shown])
    lines["growth"] = [
        [
            "model",
            "devices",
            "blockwise context",
            "ring context",
            "times",
            "FLOPs a token, appendix D",
            "causal, with vocabulary",
            "attention's share before",
            "and after",
        ]
    ]
    for row in tables["growth"]:
        lines["growth"].append(
            [
                row.model,
                row.hardware,
                short(row.blockwise_tokens),
                short(row.ring_tokens),
                str(row.ring_tokens // row.blockwise_tokens),
                f"{row.ratio:.1f}",
                f"{row.causal_ratio:.1f}",
                f"{100 * row.blockwise_attention:.0f}%",
                f"{100 * row.ring_attention:.0f}%",
            ]
        )
    return lines


def short(tokens: int) -> str:
    """A count as K or M of 1024."""
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 2**10}K"


def differs(ours: float, printed: float | None) -> bool:
    """Whether a figure that is printed with one digit after the point is another than ours."""
    return printed is not None and f"{ours:.1f}" != f"{printed:.1f}"


def draw_overlap(rows: list[Overlap]) -> Figure:
    """What a device's share has to be, on a logarithmic scale."""
    figure = Figure(figsize=(7.6, 0.36 * len(rows) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    names = [row.hardware for row in rows]
    series = (
        ("block", "F / B, all links", "o", "tab:blue"),
        ("one_link", "one link to the next device", "s", "tab:orange"),
        ("training", "and causal zigzag, backward", "^", "tab:red"),
        ("grouped", "and grouped queries", "v", "tab:green"),
    )
    for field, label, marker, color in series:
        axes.scatter([getattr(row, field) for row in rows], names, marker=marker, color=color, label=label, zorder=3)
    printed = [row for row in rows if row.printed_block is not None]
    axes.scatter(
        [row.printed_block for row in printed if row.printed_block is not None],
        [row.hardware for row in printed],
        marker="x",
        color="black",
        label="printed block",
        zorder=4,
    )
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("tokens a device from which on transfers hide")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def draw_flops(cells: list[FlopsRatio], reference_tokens: int) -> Figure:
    """Figure 5 as curves, the printed values as points."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, model in enumerate(dict.fromkeys(cell.model for cell in cells)):
        own = [cell for cell in cells if cell.model == model]
        axes.loglog([c.tokens for c in own], [c.ratio for c in own], color=f"C{i}", base=2, label=model)
        shown = [cell for cell in own if cell.printed is not None]
        axes.plot([c.tokens for c in shown], [c.printed for c in shown if c.printed is not None], "x", color=f"C{i}")
    axes.set_yscale("log")
    ticks = sorted({cell.tokens for cell in cells})
    axes.set_xticks(ticks, [short(count) for count in ticks], fontsize=7)
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel(f"FLOPs on a data set, of those at {short(reference_tokens)}")
    axes.set_title("curves: (6 h + s) / (6 h + s₁); crosses: printed", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write_results(config: TablesConfig, tables: dict[str, Sequence[Any]]) -> None:
    """CSV, tables, pictures and where the figures are from, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_whole(config.output / f"{name}.csv", csv_table([dataclasses.asdict(row) for row in rows]))
        write_whole(config.output / f"{name}.md", markdown_table(as_text(config, tables)[name]))
    pictures = {
        "overlap": draw_overlap(list(tables["overlap"])),
        "flops": draw_flops(list(tables["flops"]), config.data_set.reference_tokens),
    }
    for name, figure in pictures.items():
        with atomic_file(config.output / f"{name}.png", overwrite=True) as temporary:
            figure.savefig(temporary, dpi=130)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "hardware": {name: dataclasses.asdict(HARDWARE[name]) for name in config.overlap.hardware},
        "commit": git_commit(),
        "versions": versions("ring_rl"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def last_line(tables: dict[str, Sequence[Any]]) -> str:
    """name=value: how many printed figures there are, and how many are ours, too."""
    pairs = [
        (ours / 1e3, printed / 1e3)
        for row in tables["overlap"]
        for ours, printed in ((row.block, row.printed_block), (row.sequence, row.printed_sequence))
        if printed is not None
    ]
    cells = [(cell.ratio, cell.printed) for cell in tables["flops"] if cell.printed is not None]
    return " ".join(
        f"{name}_printed={len(figures)} {name}_reproduced={sum(not differs(*pair) for pair in figures)}"
        for name, figures in (("overlap", pairs), ("flops", cells))
    )


def make_tables(config: TablesConfig) -> dict[str, Sequence[Any]]:
    """Computes, writes and prints all tables."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    tables: dict[str, Sequence[Any]] = {
        "overlap": overlap_rows(config.overlap),
        "flops": flops_ratios(config.data_set),
        "growth": growth_rows(config.growth),
    }
    write_results(config, tables)
    console = Console(width=max(140, Console().width))
    for lines in as_text(config, tables).values():
        table = Table(*lines[0])
        for line in lines[1:]:
            table.add_row(*line)
        console.print(table)
    return tables


@hydra.main(config_path="../conf", config_name="systems_tables", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into tables."""
    with exit_on_bad_input():
        print(last_line(make_tables(from_mapping(TablesConfig, resolve(cfg)))))


if __name__ == "__main__":
    run_entry_point(main)
