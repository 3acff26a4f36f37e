"""Which ways to attend fit a device, by compiled memory; conf/attention_memory.yaml documents every key."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.agent.agents import SequenceAgentConfig, sequence_model_config
from ring_rl.agent.chain_batch import empty_batch
from ring_rl.agent.loss import make_action_loss
from ring_rl.agent.model import make_model
from ring_rl.agent.tokens import Normalisation, tokens_per_step
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.hardware import HARDWARE
from ring_rl.kernels.layout import Layout
from ring_rl.kernels.local.block import LocalName
from ring_rl.nn.parallel import SequenceParallel, SequenceStrategy
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.training.dry_run import DryRun, dry_run
from ring_rl.training.mesh import MeshConfig, batch_sharding, make_mesh, request_virtual_devices, with_shardings
from ring_rl.training.optimizer import OptimizerConfig, make_optimizer
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.state import abstract_state
from ring_rl.training.step import make_train_step
from ring_rl.training.tables import markdown_table

OUTPUTS = ("memory.csv", "table.md", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to attend.

    Attributes:
        strategy: "dense", or "ring", which on one device is blockwise attention.
        chain_over_devices: Whether all devices share a chain; otherwise each has one of its own.
        saved_activations: Of a layer, see `TransformerConfig`.
        feed_forward_chunks: Steps of the feed-forward.
    """

    strategy: SequenceStrategy
    chain_over_devices: bool
    saved_activations: SavedActivations
    feed_forward_chunks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMemoryConfig:
    """What is compiled, and for which devices."""

    trajectories: tuple[int, ...]
    episode_steps: int
    devices: int
    layout: Layout
    local_block: LocalName
    observation_dim: int
    action_dim: int
    variants: dict[str, Variant]
    hardware: tuple[str, ...]
    paper: dict[str, dict[str, Literal["fits", "oom"]]]
    output: Path
    overwrite: bool
    agent: SequenceAgentConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if not self.variants or not self.trajectories or min(self.trajectories) < 1:
            raise ValueError("attention_memory needs at least one variant and chains of at least 1 trajectory")
        for name in self.hardware:
            if name not in HARDWARE:
                raise ValueError(f"unknown hardware {name!r}; choose of {', '.join(HARDWARE)}")
        for name in self.paper:
            if name not in self.variants:
                raise ValueError(f"paper.{name} is no variant; choose of {', '.join(self.variants)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled step; `needed_bytes` is None where the compiler itself ran out of memory."""

    variant: str
    trajectories: int
    tokens: int
    parameters: int
    needed_bytes: int | None

    def verdict(self, hardware: str) -> str:
        """Whether a device's memory, by its data sheet, holds the step."""
        fits = self.needed_bytes is not None and self.needed_bytes <= HARDWARE[hardware].memory_bytes
        return "fits" if fits else "oom"


def compiled(config: AttentionMemoryConfig, variant: Variant, trajectories: int) -> DryRun:
    """The training step over as many chains as there are devices, compiled for their shapes."""
    count = config.devices
    over = variant.chain_over_devices
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1 if over else count, tp=1, sp=count if over else 1))
    parallel = SequenceParallel(
        mesh=mesh,
        layout=config.layout,
        strategy=variant.strategy,
        weight_axes=("fsdp", "sp") if over else ("fsdp",),
        local_block=config.local_block,
    )
    transformer = dataclasses.replace(
        config.agent.transformer,
        saved_activations=variant.saved_activations,
        feed_forward_chunks=variant.feed_forward_chunks,
    )
    agent = dataclasses.replace(
        config.agent,
        transformer=transformer,
        chain=dataclasses.replace(config.agent.chain, trajectories=trajectories),
    )
    model = sequence_model_config(
        agent,
        episode_steps=config.episode_steps,
        observation_dim=config.observation_dim,
        action_dim=config.action_dim,
        normalisation=Normalisation.identity(config.observation_dim),
    )
    steps = trajectories * config.episode_steps
    tokens = steps * tokens_per_step(agent.token_layout)
    transformer.check(parallel, batch=count, length=tokens)
    optimizer = make_optimizer(config.optimizer, total_steps=config.optimizer.warmup_steps + 1)
    graphdef, state = abstract_state(
        lambda rngs: make_model(model, rngs), optimizer, mesh=mesh, weight_axes=parallel.weight_axes
    )
    batch = empty_batch(
        batch_size=count, steps=steps, observation_dim=config.observation_dim, action_dim=config.action_dim
    )
    step = make_train_step(
        make_action_loss(parallel),
        graphdef,
        optimizer,
        mesh,
        seed=0,
        # So every variant learns from as many chains in a step.
        accumulation_steps=count if over else 1,
    )
    return dry_run(
        step,
        state,
        with_shardings(batch, batch_sharding(mesh, batch)),
        mesh=mesh,
        tokens=count * tokens,
        model_flops=None,
        device_memory_gib=None,
    )


def table_rows(config: AttentionMemoryConfig, rows: list[Row]) -> list[list[str]]:
    """The header and a line a row, as text."""
    devices = [f"{name}, {HARDWARE[name].memory_bytes / 1e9:.0f} GB" for name in config.hardware]
    lines = [["attention", "trajectories", "tokens a chain", "GB a device", *devices, "the paper"]]
    for row in rows:
        size = "more than the compiler takes" if row.needed_bytes is None else f"{row.needed_bytes / 1e9:,.1f}"
        published = config.paper.get(row.variant, {}).get(str(row.trajectories), "")
        verdicts = [row.verdict(name) for name in config.hardware]
        lines.append([row.variant, str(row.trajectories), f"{row.tokens:,}", size, *verdicts, published])
    return lines


def write_results(config: AttentionMemoryConfig, rows: list[Row]) -> None:
    """CSV, table and provenance, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = [field.name for field in dataclasses.fields(Variant)]
    writer.writerow(["attention", *fields, "trajectories", "tokens", "parameters", "needed_bytes", *config.hardware])
    for row in rows:
        variant = config.variants[row.variant]
        writer.writerow(
            [
                row.variant,
                *(getattr(variant, name) for name in fields),
                row.trajectories,
                row.tokens,
                row.parameters,
                "" if row.needed_bytes is None else row.needed_bytes,
                *(row.verdict(name) for name in config.hardware),
            ]
        )
    write_whole(config.output / "memory.csv", text.getvalue())
    write_whole(config.output / "table.md", markdown_table(table_rows(config, rows)))
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "hardware": {name: dataclasses.asdict(HARDWARE[name]) for name in config.hardware},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def measure(config: AttentionMemoryConfig) -> list[Row]:
    """Compiles every variant for every chain and reports."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(config.devices)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(config.variants) * len(config.trajectories))
        for trajectories in config.trajectories:
            for name, variant in config.variants.items():
                progress.update(bar, description=f"{name}, {trajectories} trajectories")
                report = compiled(config, variant, trajectories)
                rows.append(
                    Row(
                        variant=name,
                        trajectories=trajectories,
                        tokens=report.tokens // config.devices,
                        parameters=report.parameters,
                        needed_bytes=report.needed_bytes,
                    )
                )
                progress.advance(bar)
    write_results(config, rows)
    lines = table_rows(config, rows)
    table = Table(*lines[0], title=f"{rows[0].parameters / 1e6:.0f} M parameters, {config.devices} devices")
    for line in lines[1:]:
        table.add_row(*line)
    Console(width=max(140, Console().width)).print(table)
    return rows


def last_line(config: AttentionMemoryConfig, rows: list[Row]) -> str:
    """name=value: of each variant and chain the gigabytes, and whether the first device holds them."""
    figures = [f"parameters={rows[0].parameters}", f"hardware={config.hardware[0].replace(' ', '_')}"]
    for row in rows:
        name = re.sub(r"[^a-z0-9]+", "_", row.variant)
        size = "inf" if row.needed_bytes is None else f"{row.needed_bytes / 1e9:.1f}"
        figures.append(f"{name}_{row.trajectories}={size}:{row.verdict(config.hardware[0])}")
    return " ".join(figures)


@hydra.main(config_path="../conf", config_name="attention_memory", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        config = from_mapping(AttentionMemoryConfig, resolve(cfg))
        print(last_line(config, measure(config)))


if __name__ == "__main__":
    run_entry_point(main)
