"""Meshes, memory, time and the ring's timeline of a planned training; conf/plan.yaml documents every key."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.hardware import HARDWARE, Hardware
from ring_rl.kernels.layout import Layout
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.nn.transformer import TransformerConfig
from ring_rl.planning.compiled_step import StepRequest
from ring_rl.planning.memory_model import Compiler
from ring_rl.planning.plan_report import (
    assumptions,
    attention_text,
    axes_text,
    fact_rows,
    figures_line,
    mesh_records,
    mesh_rows,
)
from ring_rl.planning.rates import Cluster, Rates
from ring_rl.planning.ring_phases import ring_phases
from ring_rl.planning.ring_timeline import Timeline, draw_timelines, simulate_ring
from ring_rl.planning.roofline import days_for
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.planning.suggest import Constraints, Suggestion, Suggestions, fewest_devices, suggest
from ring_rl.planning.topology import TPU_SLICES, Machine, TpuSlice, generation_of, machine_named
from ring_rl.training.mesh import MeshConfig
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.provenance import git_commit, versions
from ring_rl.training.tables import csv_table, markdown_table

# How many GPUs are tried at most, by doubling, where those asked for do not do.
MOST_GPUS = 8192
OUTPUTS = ("meshes.csv", "table.md", "timeline.png", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimelineConfig:
    """What is not alike in the ring that is drawn.

    Attributes:
        slow_devices: Number in the ring, and multiple of the hardware's speed.
        slow_links: The same of the link from a device to the next.
        devices_drawn: Rows of the picture.
    """

    slow_devices: tuple[tuple[int, float], ...]
    slow_links: tuple[tuple[int, float], ...]
    devices_drawn: int

    def __post_init__(self) -> None:
        if self.devices_drawn < 1:
            raise ValueError(f"devices_drawn must be at least 1, got {self.devices_drawn}")
        for number, speed in self.slow_devices + self.slow_links:
            if number < 0 or not speed > 0:
                raise ValueError(f"slow devices are pairs of a number from 0 and a positive speed, got {number, speed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is planned."""

    transformer: TransformerConfig
    optimizer: OptimizerConfig
    vocabulary_size: int
    tied_embedding: bool
    context: int
    batch_tokens: int
    hardware: str
    rates_of: str | None
    node_gpus: int
    layout: Layout
    loss_chunks: int
    heads_at_once: int | None
    mesh: Constraints
    policies: tuple[SavedActivations, ...]
    token_budget: float
    rates: Rates
    timeline: TimelineConfig
    shown: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("policies needs at least one way to save activations, such as [attention]")
        if not self.token_budget > 0:
            raise ValueError(f"token_budget must be positive, got {self.token_budget}")
        if self.node_gpus < 1:
            raise ValueError(f"node_gpus must be at least 1, got {self.node_gpus}")
        if self.heads_at_once is not None and self.heads_at_once < 1:
            raise ValueError(f"heads_at_once must be at least 1, or null for all of them, got {self.heads_at_once}")
        if self.shown < 1:
            raise ValueError(f"shown must be at least 1, got {self.shown}")

    def request(self) -> StepRequest:
        """The step, on one device for now."""
        return StepRequest(
            model=LanguageModelConfig(
                name="language",
                vocabulary_size=self.vocabulary_size,
                tied_embedding=self.tied_embedding,
                embedding_scale=0.02,
                trained_positions=0,
                transformer=self.transformer,
            ),
            mesh=MeshConfig(dp=1, fsdp=1, tp=1, sp=1),
            layout=self.layout,
            strategy="ring",
            ulysses_size=1,
            weights_over_ring=False,
            context=self.context,
            batch_size=1,
            loss_chunks=self.loss_chunks,
            optimizer=self.optimizer,
            attention_block="auto",
            heads_at_once=self.heads_at_once,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found.

    Attributes:
        found: All meshes.
        cluster: What their times stand on.
        note: What of the request was changed to find them, in words; empty if nothing.
        timelines: The ring of the fastest, by title; empty without a ring.
        line: For programs.
    """

    found: Suggestions
    cluster: Cluster
    note: str
    timelines: dict[str, Timeline]
    line: str

    @property
    def best(self) -> Suggestion:
        """The fastest."""
        return self.found.fitting[0]


def cluster_of(machine: Machine, *, rates_of: str | None, node_gpus: int) -> Cluster:
    """What its devices reach, and what joins them.

    Raises:
        ValueError: Nobody wrote it down.
    """
    if rates_of is not None:
        return Cluster(device=_known(rates_of))
    if isinstance(machine, TpuSlice):
        device = _known(f"TPU {machine.generation}")
        cores = machine.devices // machine.chips
        if cores == 1:
            return Cluster(device=device)
        # The figures are a chip's; its memory is written down by the device.
        name = f"half of a {device.name}" if cores == 2 else f"1/{cores} of a {device.name}"
        flops, sent = device.flops_per_second / cores, device.bytes_per_second / cores
        return Cluster(device=dataclasses.replace(device, name=name, flops_per_second=flops, bytes_per_second=sent))
    kind = machine.generation
    device = _known(kind if f"{kind} NVLink" not in HARDWARE and kind in HARDWARE else f"{kind} NVLink")
    if machine.devices <= node_gpus:
        return Cluster(device=device)
    if f"{kind} InfiniBand" not in HARDWARE:
        raise ValueError(
            f"no rates are known between nodes of {kind}, and {machine.devices} of them are more than node_gpus="
            f"{node_gpus}; set rates_of to one of {', '.join(HARDWARE)}, for all links"
        )
    return Cluster(device=device, node_devices=node_gpus, between_nodes=HARDWARE[f"{kind} InfiniBand"])


def _known(name: str) -> Hardware:
    if name not in HARDWARE:
        raise ValueError(f"no rates are known of {name!r}; set rates_of to one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def make_plan(config: PlanConfig) -> Plan:
    """All that is asked for, printed and written.

    Raises:
        ValueError: Nothing fits; the error says what would.
    """
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    try:
        machine = machine_named(config.hardware)
    except ValueError as error:
        raise ValueError(f"{error}{_instead(config, config.hardware)}") from None
    cluster = cluster_of(machine, rates_of=config.rates_of, node_gpus=config.node_gpus)
    judged = partial(
        suggest,
        devices=machine.devices,
        batch_tokens=config.batch_tokens,
        cluster=cluster,
        memory_bytes=machine.memory_bytes,
        rates=config.rates,
        policies=config.policies,
        compiler=_compiler(machine),
        constraints=config.mesh,
    )
    note = ""
    try:
        found = judged(config.request())
    except ValueError as error:
        raise ValueError(f"{error}{_instead(config, config.hardware)}") from None
    if not found.fitting and config.heads_at_once is None:
        found_by_head = judged(dataclasses.replace(config.request(), heads_at_once=1))
        if found_by_head.fitting:
            found, note = found_by_head, " with heads_at_once=1, none with all heads at once"
    if not found.fitting:
        nearest = found.refused[0]
        raise ValueError(
            f"no mesh of {machine.name} does; the nearest, {axes_text(nearest.mesh)} ({nearest.strategy}), "
            f"{nearest.reason}{_instead(config, machine.name)}"
        )
    best = found.fitting[0]
    timelines = ring_timelines(config, best, cluster)
    line = figures_line(best, machine, token_budget=config.token_budget, timelines=timelines)
    plan = Plan(found=found, cluster=cluster, note=note, timelines=timelines, line=line)
    write_results(plan, config, machine)
    show(plan, config, machine)
    return plan


def _compiler(machine: Machine) -> Compiler:
    return "tpu" if isinstance(machine, TpuSlice) else "cpu"


def _instead(config: PlanConfig, name: str) -> str:
    """; what machine of the kind of that name would do, with all heads at once or else with one; or that none would.

    Empty where the name does not say of what kind it is.
    """
    generation = generation_of(re.sub(r"^v5litepod-", "v5e-", name.strip().casefold()))
    gpus = re.fullmatch(r"gpu:\d+x([\w.]+-\d+GB)", name)
    if generation is not None:
        slices = {each.devices: each for each in TPU_SLICES.values() if each.generation == generation}
        machines: dict[int, Machine] = {devices: slices[devices] for devices in sorted(slices)}
    elif gpus is not None:
        machines = {2**n: machine_named(f"gpu:{2**n}x{gpus[1]}") for n in range(MOST_GPUS.bit_length())}
    else:
        return ""
    if config.context > config.batch_tokens:
        # No machine reads less than one sequence a step.
        return ""
    by_head = (None, 1) if config.heads_at_once is None else (config.heads_at_once,)
    largest = machines[max(machines)]
    found: list[StepSizes] = []
    for heads in by_head:
        sizes = fewest_devices(
            dataclasses.replace(config.request(), heads_at_once=heads),
            counts=[n for n in machines if not found or n < found[0].devices],
            batch_tokens=config.batch_tokens,
            memory_bytes=largest.memory_bytes,
            policies=config.policies,
            compiler=_compiler(largest),
            constraints=config.mesh,
        )
        found = found if sizes is None else [sizes]
    if not found:
        return f"; none up to {largest.name} would do: shorten the context, lower batch_tokens or free the mesh"
    heads = "" if found[0].request.heads_at_once == config.heads_at_once else " with heads_at_once=1"
    saved = found[0].transformer.saved_activations
    return (
        f"; the smallest that would do is {machines[found[0].devices].name}, as {axes_text(found[0].mesh)} "
        f"({attention_text(found[0])}, saved_activations={saved}){heads}"
    )


def ring_timelines(config: PlanConfig, best: Suggestion, cluster: Cluster) -> dict[str, Timeline]:
    """One ring of a layer as planned, and with the slow devices and links; nothing where there is no ring."""
    if not best.sizes.keys_travel:
        return {}
    ring = best.sizes.ring_size
    devices = _speeds(config.timeline.slow_devices, ring)
    links = _speeds(config.timeline.slow_links, ring)
    timelines = {}
    for backward in (False, True):
        for title, changes in (
            ("all alike", {}),
            ("slow devices", {"device_speeds": devices}),
            ("slow links", {"link_speeds": links}),
        ):
            phases = ring_phases(best.sizes, cluster=cluster, rates=config.rates, backward=backward, **changes)
            timelines[f"{'backward' if backward else 'forward'}, {title}"] = simulate_ring(phases)
    return timelines


def _speeds(given: tuple[tuple[int, float], ...], ring: int) -> list[float]:
    """A speed a device; those that the ring does not have are left out."""
    speeds = [1.0] * ring
    for number, speed in given:
        if number < ring:
            speeds[number] = speed
    return speeds


def write_results(plan: Plan, config: PlanConfig, machine: Machine) -> None:
    """All meshes as CSV, the best as a table, the timeline's picture, and what they were made of."""
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "meshes.csv", csv_table(mesh_records(plan.found)))
    write_whole(config.output / "table.md", markdown_table(mesh_rows(plan.found, config.shown)))
    picture = config.output / "timeline.png"
    if plan.timelines:
        with atomic_file(picture, overwrite=True) as temporary:
            drawn = draw_timelines(plan.timelines, devices_drawn=config.timeline.devices_drawn, columns=2)
            drawn.savefig(temporary, dpi=130)
    else:
        # An earlier plan's would be taken for this one's.
        picture.unlink(missing_ok=True)
    best = plan.best
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "cluster": dataclasses.asdict(plan.cluster),
        "memory_bytes": machine.memory_bytes,
        "note": plan.note.strip(),
        "best": {
            "mesh": dataclasses.asdict(best.sizes.mesh),
            "attention": attention_text(best.sizes),
            "context": best.sizes.request.context,
            "heads_at_once": best.sizes.request.heads_at_once,
            "step_tokens": best.sizes.step_tokens,
            "microbatches": best.sizes.microbatches,
            "memory": best.memory.parts,
            "moment": best.memory.moment,
            "seconds": best.time.parts(),
            "utilisation": best.time.utilisation,
            "days": days_for(config.token_budget, best.time),
        },
        "timeline_seconds": {title: timeline.seconds for title, timeline in plan.timelines.items()},
        "commit": git_commit(),
        "versions": versions("ring_rl", "jax", "jaxlib"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def show(plan: Plan, config: PlanConfig, machine: Machine) -> None:
    """The tables on the console."""
    console = Console(width=max(150, Console().width))
    found = plan.found
    lines = mesh_rows(found, config.shown)
    title = f"{len(found.fitting)} of {len(found.fitting) + len(found.refused)} meshes fit {machine.name}{plan.note}"
    table = Table(*lines[0], title=title)
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)
    facts = Table("the fastest", "", title=f"{axes_text(plan.best.sizes.mesh)}, {attention_text(plan.best.sizes)}")
    for name, value in fact_rows(
        plan.best, estimated=machine.estimated, token_budget=config.token_budget, timelines=plan.timelines
    ):
        facts.add_row(name, value)
    console.print(facts)
    console.print(assumptions(plan.cluster, config.rates))


@hydra.main(config_path="../conf", config_name="plan", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a plan."""
    with exit_on_bad_input():
        config = from_mapping(PlanConfig, resolve(cfg))
        print(make_plan(config).line)


if __name__ == "__main__":
    run_entry_point(main)
