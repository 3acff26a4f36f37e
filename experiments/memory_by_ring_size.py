"""Compiled memory a device against the ring size; conf/memory_by_ring_size.yaml documents every key."""

import dataclasses
import json
from pathlib import Path

import hydra
import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ring_rl.agent.agents import SequenceAgentConfig, sequence_model_config
from ring_rl.agent.chain_batch import empty_batch
from ring_rl.agent.loss import make_action_loss
from ring_rl.agent.model import make_model
from ring_rl.agent.tokens import Normalisation, tokens_per_step
from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.layout import Layout
from ring_rl.kernels.local.block import LocalName
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, batch_sharding, make_mesh, request_virtual_devices, with_shardings
from ring_rl.training.optimizer import OptimizerConfig, make_optimizer
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.state import create_state
from ring_rl.training.step import compile_step, compiled_report, make_train_step
from ring_rl.training.tables import csv_table, markdown_table

OUTPUTS = ("memory.csv", "table.md", "memory.png", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is compiled, for which rings."""

    steps: int
    ring_sizes: tuple[int, ...]
    layout: Layout
    local_block: LocalName
    observation_dim: int
    action_dim: int
    output: Path
    overwrite: bool
    agent: SequenceAgentConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if not self.ring_sizes or min(self.ring_sizes) < 1:
            raise ValueError(f"ring_sizes must hold at least one size of 1 or more, got {list(self.ring_sizes)}")


def compiled_memory(config: MemoryConfig, ring_size: int) -> dict[str, int]:
    """The report of the training step over `ring_size` devices, and the tokens it reads."""
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=ring_size))
    parallel = SequenceParallel(mesh=mesh, layout=config.layout, local_block=config.local_block)
    agent = config.agent
    model = sequence_model_config(
        agent,
        episode_steps=-(-config.steps // agent.chain.trajectories),
        observation_dim=config.observation_dim,
        action_dim=config.action_dim,
        normalisation=Normalisation.identity(config.observation_dim),
    )
    optimizer = make_optimizer(config.optimizer, total_steps=config.optimizer.warmup_steps + 1)
    graphdef, state = create_state(lambda rngs: make_model(model, rngs), optimizer, seed=0, mesh=mesh)
    batch = empty_batch(
        batch_size=1, steps=config.steps, observation_dim=config.observation_dim, action_dim=config.action_dim
    )
    shapes = with_shardings(batch, batch_sharding(mesh, batch))
    step = make_train_step(make_action_loss(parallel), graphdef, optimizer, mesh, seed=0)
    return {
        "ring_size": ring_size,
        "tokens": config.steps * tokens_per_step(agent.token_layout),
        **compiled_report(compile_step(step, state, shapes)),
    }


def write_results(config: MemoryConfig, reports: list[dict[str, int]]) -> None:
    """CSV, picture and the configuration, beside one another."""
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "memory.csv", csv_table(reports))
    write_whole(config.output / "table.md", markdown_table(memory_rows(reports)))
    sizes = np.array([report["ring_size"] for report in reports])
    total = np.array([report["argument_bytes"] + report["temporary_bytes"] for report in reports]) / 2**20
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(sizes, total, marker="o", base=2, label="compiled training step")
    axes.loglog(sizes, total[0] * sizes[0] / sizes, color="0.6", linestyle="--", base=2, label="in proportion")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("ring size")
    axes.set_ylabel("MiB a device")
    axes.set_title(f"{reports[0]['tokens']:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(config.output / "memory.png", overwrite=True) as temporary:
        figure.savefig(temporary, dpi=130)


def memory_rows(reports: list[dict[str, int]]) -> list[list[str]]:
    """The header and a row a ring size, as text."""
    rows = [["ring size", "tokens a device", "MiB a device", f"of a ring of {reports[0]['ring_size']}"]]
    whole = reports[0]["argument_bytes"] + reports[0]["temporary_bytes"]
    for report in reports:
        total = report["argument_bytes"] + report["temporary_bytes"]
        rows.append(
            [
                str(report["ring_size"]),
                f"{report['tokens'] // report['ring_size']:,}",
                f"{total / 2**20:.1f}",
                f"1/{whole / total:.2f}",
            ]
        )
    return rows


def measure(config: MemoryConfig) -> None:
    """Compiles for every ring size and reports."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(max(config.ring_sizes))
    console = Console()
    with console.status("compiling") as status:
        reports = []
        for ring_size in config.ring_sizes:
            status.update(f"compiling for a ring of {ring_size}")
            reports.append(compiled_memory(config, ring_size))
    write_results(config, reports)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    table = Table(*memory_rows(reports)[0])
    total = lambda report: report["argument_bytes"] + report["temporary_bytes"]  # noqa: E731
    for row in memory_rows(reports)[1:]:
        table.add_row(*row)
    console.print(table)
    print(" ".join(f"mib_ring_{report['ring_size']}={total(report) / 2**20:.1f}" for report in reports))


@hydra.main(config_path="../conf", config_name="memory_by_ring_size", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        config = from_mapping(MemoryConfig, resolve(cfg))
        measure(config)


if __name__ == "__main__":
    run_entry_point(main)
