"""What each memory option saves, by compiled memory; conf/memory_by_option.yaml documents every key."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.layout import Layout
from ring_rl.kernels.local.block import LocalName
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.nn.transformer import Transformer, TransformerConfig
from ring_rl.nn.vocabulary import Vocabulary
from ring_rl.training.dry_run import needed_bytes
from ring_rl.training.mesh import MeshConfig, batch_sharding, make_mesh, request_virtual_devices, with_shardings
from ring_rl.training.optimizer import OptimizerConfig, make_optimizer
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.state import abstract_state
from ring_rl.training.step import Loss, compile_step, make_train_step
from ring_rl.training.tables import markdown_table
from ring_rl.typing import Array

ALL_TOGETHER = "all together"
OUTPUTS = ("memory.csv", "table.md", "memory.png", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What may be given up for memory.

    Attributes:
        saved_activations: of a layer, see `TransformerConfig`.
        feed_forward_chunks: steps of the feed-forward.
        loss_chunks: steps of the vocabulary loss.
        weights_over_ring: whether the devices that share a sequence also share weights and moments.
    """

    saved_activations: SavedActivations
    feed_forward_chunks: int
    loss_chunks: int
    weights_over_ring: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryByOptionConfig:
    """What is compiled."""

    tokens: int
    devices: int
    layout: Layout
    local_block: LocalName
    vocabulary: int
    transformer: TransformerConfig
    optimizer: OptimizerConfig
    plain: Options
    options: Options
    further_policies: tuple[SavedActivations, ...]
    multiples: tuple[int, ...]
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if list(self.multiples) != sorted(set(self.multiples)) or min(self.multiples, default=2) < 2:
            raise ValueError(f"multiples must ascend and be at least 2, got {list(self.multiples)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled step."""

    name: str
    tokens: int
    options: Options
    needed_bytes: int


class LanguageModel(nnx.Module):
    """Embedding, transformer, head."""

    def __init__(self, config: TransformerConfig, *, vocabulary: int, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        self.vocabulary = Vocabulary(size=vocabulary, width=config.width, tied=False, dtype=dtype, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)

    def loss(self, batch: dict[str, Array], parallel: SequenceParallel, *, chunks: int) -> Loss:
        """Cross-entropy of the targets, over all tokens."""
        x = self.vocabulary.embed(batch["tokens"], parallel)
        hidden = self.transformer(x, batch["positions"], parallel)
        sums = self.vocabulary.cross_entropy(hidden, batch["targets"], parallel, chunks=chunks)
        return Loss(total=sums.loss_sum, weight=sums.weight_sum, metrics={})


def needed(config: MemoryByOptionConfig, options: Options, tokens: int) -> int:
    """Bytes that a device needs for a step over one sequence of `tokens`."""
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=config.devices))
    weight_axes = ("fsdp", "sp") if options.weights_over_ring else ("fsdp",)
    parallel = SequenceParallel(
        mesh=mesh, layout=config.layout, weight_axes=weight_axes, local_block=config.local_block
    )
    transformer = dataclasses.replace(
        config.transformer,
        saved_activations=options.saved_activations,
        feed_forward_chunks=options.feed_forward_chunks,
    )
    optimizer = make_optimizer(config.optimizer, total_steps=config.optimizer.warmup_steps + 1)
    graphdef, state = abstract_state(
        lambda rngs: LanguageModel(transformer, vocabulary=config.vocabulary, rngs=rngs),
        optimizer,
        mesh=mesh,
        weight_axes=weight_axes,
    )
    shape = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "targets"), shape)
    batch = with_shardings(batch, batch_sharding(mesh, batch))
    step = make_train_step(
        lambda model, batch, _: model.loss(batch, parallel, chunks=options.loss_chunks),
        graphdef,
        optimizer,
        mesh,
        seed=0,
    )
    return needed_bytes(compile_step(step, state, batch), platform=mesh.devices.flat[0].platform)


def variants(config: MemoryByOptionConfig) -> dict[str, Options]:
    """The plain model, each option alone, all together, and all but each, by name."""
    options = config.options
    names = {
        "saved_activations": f"saved activations: {options.saved_activations}",
        "feed_forward_chunks": f"feed-forward in {options.feed_forward_chunks} steps",
        "loss_chunks": f"loss in {options.loss_chunks} steps",
        "weights_over_ring": "weights and moments sharded over the ring",
    }
    found = {"plain ring": config.plain}
    for policy in config.further_policies:
        found[f"saved activations: {policy}"] = dataclasses.replace(config.plain, saved_activations=policy)
    for field, name in names.items():
        found[name] = dataclasses.replace(config.plain, **{field: getattr(options, field)})
    found[ALL_TOGETHER] = options
    for field, name in names.items():
        found[f"all but: {name}"] = dataclasses.replace(options, **{field: getattr(config.plain, field)})
    return found


def longest_context(config: MemoryByOptionConfig, limit: int, progress: Progress) -> list[Row]:
    """Steps with all options at growing contexts, up to the first that needs more than `limit` bytes."""
    rows = []
    bar = progress.add_task("all options, longer contexts", total=len(config.multiples))
    for multiple in config.multiples:
        tokens = multiple * config.tokens
        row = Row(
            name=f"{ALL_TOGETHER}, {multiple} x the context",
            tokens=tokens,
            options=config.options,
            needed_bytes=needed(config, config.options, tokens),
        )
        rows.append(row)
        progress.advance(bar)
        if row.needed_bytes > limit:
            break
    return rows


def table_rows(rows: list[Row]) -> list[list[str]]:
    """The header and a line a row, as text."""
    plain = rows[0].needed_bytes
    lines = [["options", "tokens", "MiB a device", "of the plain model"]]
    for row in rows:
        lines.append(
            [row.name, f"{row.tokens:,}", f"{row.needed_bytes / 2**20:,.0f}", f"{100 * row.needed_bytes / plain:.0f}%"]
        )
    return lines


def write_results(config: MemoryByOptionConfig, rows: list[Row]) -> None:
    """CSV, table, picture and provenance, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = [field.name for field in dataclasses.fields(Options)]
    writer.writerow(["name", "tokens", *fields, "needed_bytes"])
    for row in rows:
        writer.writerow([row.name, row.tokens, *(getattr(row.options, name) for name in fields), row.needed_bytes])
    write_whole(config.output / "memory.csv", text.getvalue())
    write_whole(config.output / "table.md", markdown_table(table_rows(rows)))
    figure = Figure(figsize=(7.2, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    names = [row.name for row in rows]
    axes.barh(names, [row.needed_bytes / 2**30 for row in rows], color=["0.5"] + ["C0"] * (len(rows) - 1))
    axes.axvline(rows[0].needed_bytes / 2**30, color="0.5", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("GiB a device, compiled training step")
    axes.set_title(f"{config.tokens:,} tokens over {config.devices} devices")
    with atomic_file(config.output / "memory.png", overwrite=True) as temporary:
        figure.savefig(temporary, dpi=130)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def measure(config: MemoryByOptionConfig) -> None:
    """Compiles every variant and reports."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(config.devices)
    rows = []
    with Progress(transient=True) as progress:
        wanted = variants(config)
        bar = progress.add_task("compiling", total=len(wanted))
        for name, options in wanted.items():
            progress.update(bar, description=name)
            size = needed(config, options, config.tokens)
            rows.append(Row(name=name, tokens=config.tokens, options=options, needed_bytes=size))
            progress.advance(bar)
        plain = rows[0].needed_bytes
        longer = longest_context(config, plain, progress)
    fitting = [row.tokens // config.tokens for row in longer if row.needed_bytes <= plain]
    rows += longer
    together = next(row.needed_bytes for row in rows if row.name == ALL_TOGETHER)
    write_results(config, rows)
    table = Table(*table_rows(rows)[0])
    for line in table_rows(rows)[1:]:
        table.add_row(*line)
    Console().print(table)
    print(
        f"plain_mib={plain / 2**20:.0f} all_mib={together / 2**20:.0f} "
        f"context_ratio_in_same_memory={max(fitting, default=1)}"
    )


@hydra.main(config_path="../conf", config_name="memory_by_option", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(MemoryByOptionConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
