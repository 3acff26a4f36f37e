"""Compiled memory a device as ring and context grow together; conf/lm_memory.yaml documents every key."""

import dataclasses
import json
from pathlib import Path

import hydra
import jax
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
from ring_rl.kernels.local.block import LocalName
from ring_rl.lm.evaluation.perplexity import token_losses
from ring_rl.lm.loss import make_language_loss
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.training.dry_run import needed_bytes, sharded_bytes
from ring_rl.training.mesh import MeshConfig, batch_sharding, make_mesh, request_virtual_devices, with_shardings
from ring_rl.training.optimizer import OptimizerConfig, make_optimizer
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.state import abstract_state
from ring_rl.training.step import compile_step, make_train_step
from ring_rl.training.tables import csv_table, markdown_table

OUTPUTS = ("memory.csv", "table.md", "memory.png", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is compiled, for which rings."""

    tokens_a_device: int
    ring_sizes: tuple[int, ...]
    layout: Layout
    local_block: LocalName
    alone: bool
    vocabulary_size: int
    tied_embedding: bool
    chunks: int
    output: Path
    overwrite: bool
    transformer: TransformerConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if not self.ring_sizes or min(self.ring_sizes) < 1:
            raise ValueError(f"ring_sizes must hold at least one size of 1 or more, got {list(self.ring_sizes)}")
        if self.chunks < 1 or self.tokens_a_device % self.chunks:
            raise ValueError(f"chunks={self.chunks} must divide tokens_a_device={self.tokens_a_device}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a device needs.

    Attributes:
        devices: that share the tokens.
        tokens: in all.
        training_bytes: of a training step: parameters, moments, gradients, activations.
        state_bytes: the part of it that does not depend on tokens: parameters and moments.
        perplexity_bytes: of a pass for perplexity.
    """

    devices: int
    tokens: int
    training_bytes: int
    state_bytes: int
    perplexity_bytes: int


def compiled_memory(config: MemoryConfig, *, devices: int, tokens: int) -> Row:
    """Compiles both programs for one row of `tokens` tokens over `devices` devices."""
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=devices))
    parallel = SequenceParallel(mesh=mesh, layout=config.layout, local_block=config.local_block)
    config.transformer.check(parallel, batch=1, length=tokens)
    model = LanguageModelConfig(
        name="language",
        vocabulary_size=config.vocabulary_size,
        tied_embedding=config.tied_embedding,
        embedding_scale=0.02,
        trained_positions=0,
        transformer=config.transformer,
    )
    optimizer = make_optimizer(config.optimizer, total_steps=config.optimizer.warmup_steps + 1)
    graphdef, state = abstract_state(lambda rngs: LanguageModel(model, rngs=rngs), optimizer, mesh=mesh)
    # More tokens on a device are more steps of the loss, each with as many logits.
    chunks = config.chunks * tokens // (devices * config.tokens_a_device)
    counts, weights = (jax.ShapeDtypeStruct((1, tokens), dtype) for dtype in (np.int32, np.float32))
    batch = TokenBatch(
        tokens=counts, targets=counts, weights=weights, positions=counts, segment_ids=counts, answer_ids=None
    )
    batch = with_shardings(batch, batch_sharding(mesh, batch))
    loss_function = make_language_loss(parallel, chunks=chunks, z_loss=0.0)
    training = compile_step(make_train_step(loss_function, graphdef, optimizer, mesh, seed=0), state, batch)
    perplexity = token_losses.lower(
        graphdef, state.parameters, batch.tokens, batch.positions, batch.targets, parallel=parallel, chunks=chunks
    ).compile()
    platform = mesh.devices.flat[0].platform
    return Row(
        devices=devices,
        tokens=tokens,
        training_bytes=needed_bytes(training, platform=platform),
        state_bytes=sharded_bytes(state),
        perplexity_bytes=needed_bytes(perplexity, platform=platform),
    )


def table_rows(rows: list[Row]) -> list[list[str]]:
    """The header and a line a compilation, as text."""
    lines = [
        ["devices", "tokens", "training, MiB a device", "of it parameters and moments", "perplexity, MiB a device"]
    ]
    mib = lambda size: f"{size / 2**20:,.0f}"  # noqa: E731
    for row in rows:
        sizes = (row.training_bytes, row.state_bytes, row.perplexity_bytes)
        lines.append([str(row.devices), f"{row.tokens:,}", *map(mib, sizes)])
    return lines


def write_results(config: MemoryConfig, rings: list[Row], alone: list[Row]) -> None:
    """CSV, table, picture and provenance, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "memory.csv", csv_table([dataclasses.asdict(row) for row in [*rings, *alone]]))
    write_whole(config.output / "table.md", markdown_table(table_rows([*rings, *alone])))
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("training", "perplexity"), strict=True):
        for rows, label, style in (
            (rings, f"ring, {config.tokens_a_device:,} tokens a device", {"marker": "o"}),
            ([*rings[:1], *alone], "one device", {"marker": "s", "linestyle": "--", "color": "0.5"}),
        ):
            if len(rows) > 1:
                sizes = [getattr(row, f"{name}_bytes") / 2**20 for row in rows]
                axes.plot([row.tokens for row in rows], sizes, label=label, **style)
        tokens = [row.tokens for row in rings]
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            tokens, [f"{count // 1024}K\nring {row.devices}" for count, row in zip(tokens, rings, strict=True)]
        )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in all")
        axes.set_ylabel("MiB a device")
        axes.set_title("training step" if name == "training" else "pass for perplexity")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(config.output / "memory.png", overwrite=True) as temporary:
        figure.savefig(temporary, dpi=130)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def measure(config: MemoryConfig) -> tuple[list[Row], list[Row]]:
    """Compiles for every ring, and for one device with as many tokens, and reports."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(max(config.ring_sizes))
    sizes = sorted(config.ring_sizes)
    cases = [(size, size) for size in sizes] + [(1, size) for size in sizes[1:] if config.alone]
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(cases))
        for devices, times in cases:
            tokens = times * config.tokens_a_device
            progress.update(bar, description=f"{tokens:,} tokens on {devices} devices")
            rows.append(compiled_memory(config, devices=devices, tokens=tokens))
            progress.advance(bar)
    rings, alone = rows[: len(sizes)], rows[len(sizes) :]
    write_results(config, rings, alone)
    lines = table_rows(rows)
    table = Table(*lines[0])
    for line in lines[1:]:
        table.add_row(*line)
    Console().print(table)
    return rings, alone


def last_line(rings: list[Row], alone: list[Row]) -> str:
    """name=value: how much more a device of the largest ring needs than one of the smallest."""
    figures = []
    for name in ("training_bytes", "perplexity_bytes"):
        first, last = getattr(rings[0], name), getattr(rings[-1], name)
        figures += [f"{name}_ring_{rings[0].devices}={first}", f"{name}_ring_{rings[-1].devices}={last}"]
        figures.append(f"{name}_growth={last / first:.3f}")
        if alone:
            figures.append(f"{name}_growth_of_one_device={getattr(alone[-1], name) / first:.3f}")
    return " ".join(figures)


@hydra.main(config_path="../conf", config_name="lm_memory", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        print(last_line(*measure(from_mapping(MemoryConfig, resolve(cfg)))))


if __name__ == "__main__":
    run_entry_point(main)
