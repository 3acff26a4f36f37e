"""Meshes, memory, time and the ring's timeline of a planned training; conf/plan.yaml documents every key."""

import csv
import dataclasses
import io
import json
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
from ring_rl.planning.ring_timeline import Timeline, draw_timelines, ring_phases, simulate_ring
from ring_rl.planning.roofline import Rates, days_for
from ring_rl.planning.suggest import Constraints, MostDevices, Suggestion, Suggestions, fewest_devices, suggest
from ring_rl.planning.topology import Machine, TpuSlice, machine_named, smallest_slice
from ring_rl.training.mesh import MeshConfig
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.provenance import git_commit, versions
from ring_rl.training.tables import markdown_table

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


def hardware_of(machine: Machine, name: str | None) -> Hardware:
    """The rates of one of its devices.

    Raises:
        ValueError: Nobody wrote them down.
    """
    if name is None:
        name = f"TPU {machine.generation}" if isinstance(machine, TpuSlice) else f"{machine.generation} NVLink"
        if name not in HARDWARE and machine.generation in HARDWARE:
            name = machine.generation
    if name not in HARDWARE:
        raise ValueError(f"no rates are known of {name!r}; set rates_of to one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def plan(config: PlanConfig) -> tuple[Suggestions, str]:
    """All that is asked for; the line for programs.

    Raises:
        ValueError: Nothing fits; the error says how many devices would do.
    """
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    machine = machine_named(config.hardware)
    hardware = hardware_of(machine, config.rates_of)
    compiler: Compiler = "tpu" if isinstance(machine, TpuSlice) else "cpu"
    request = config.request()
    found = suggest(
        request,
        devices=machine.devices,
        batch_tokens=config.batch_tokens,
        hardware=hardware,
        memory_bytes=machine.memory_bytes,
        rates=config.rates,
        policies=config.policies,
        compiler=compiler,
        constraints=config.mesh,
    )
    if not found.fitting:
        raise ValueError(_nothing_fits(config, machine, found, request, compiler))
    best = found.fitting[0]
    timelines = ring_timelines(config, best, hardware)
    write_results(config, found, timelines, hardware, machine)
    show(config, found, hardware, machine, timelines)
    return found, last_line(config, best, machine, timelines)


def _nothing_fits(
    config: PlanConfig, machine: Machine, found: Suggestions, request: StepRequest, compiler: Compiler
) -> str:
    """One line: what is nearest, and what would do."""
    nearest = found.refused[0]
    axes = " x ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(nearest.mesh).items())
    would = fewest_devices(
        request,
        search=MostDevices(machine.devices, 2**16),
        batch_tokens=config.batch_tokens,
        memory_bytes=machine.memory_bytes,
        policies=config.policies,
        compiler=compiler,
        constraints=config.mesh,
    )
    if would is None:
        remedy = "no number of such devices that was tried would do: shorten the context or change the constraints"
    else:
        larger = smallest_slice(machine.generation, devices=would.devices) if isinstance(machine, TpuSlice) else None
        remedy = f"{would.devices} devices would do" if larger is None else f"{larger.name} would do"
        remedy += f", as {' x '.join(f'{axis}={size}' for axis, size in dataclasses.asdict(would.mesh).items())}"
    return f"no mesh of {machine.name} does; the nearest, {axes} ({nearest.strategy}), {nearest.reason}; {remedy}"


def ring_timelines(config: PlanConfig, best: Suggestion, hardware: Hardware) -> dict[str, Timeline]:
    """The ring of one layer as planned, and with the slow devices and links; nothing where there is no ring."""
    ring = best.sizes.ring_size
    if best.sizes.attention_strategy not in ("ring", "hybrid") or ring < 2:
        return {}
    devices = _speeds(config.timeline.slow_devices, ring)
    links = _speeds(config.timeline.slow_links, ring)
    timelines = {}
    for backward in (False, True):
        for title, changes in (
            ("all alike", {}),
            ("slow devices", {"device_speeds": devices}),
            ("slow links", {"link_speeds": links}),
        ):
            phases = ring_phases(
                best.sizes,
                hardware=hardware,
                attention_share=config.rates.attention_share,
                link_share=config.rates.link_share,
                backward=backward,
                **changes,
            )
            timelines[f"{'backward' if backward else 'forward'}, {title}"] = simulate_ring(phases)
    return timelines


def _speeds(given: tuple[tuple[int, float], ...], ring: int) -> list[float]:
    """A speed a device; those that the ring does not have are left out."""
    speeds = [1.0] * ring
    for number, speed in given:
        if number < ring:
            speeds[number] = speed
    return speeds


def mesh_rows(found: Suggestions, shown: int) -> list[list[str]]:
    """The header and a line a mesh, as text."""
    lines = [
        ["mesh", "attention", "saved", "weights over", "GiB a device", "s a step", "MFU", "ring waits", "reason"],
    ]
    for each in found.fitting[:shown]:
        sizes, time = each.sizes, each.time
        waits = "" if time.overlap is None else "no" if time.overlap.hides else f"{time.waiting_seconds:.3g} s"
        lines.append(
            [
                _axes(sizes.mesh),
                _attention(each),
                sizes.transformer.saved_activations,
                "fsdp x sp" if sizes.request.weights_over_ring else "fsdp",
                f"{each.memory.total / 2**30:.2f}",
                f"{time.seconds:.3g}",
                f"{time.utilisation:.0%}",
                waits,
                "fits",
            ]
        )
    for refusal in found.refused[: max(shown - len(found.fitting), 3)]:
        size = "" if refusal.memory is None else f"{refusal.memory.total / 2**30:.2f}"
        lines.append([_axes(refusal.mesh), refusal.strategy, "", "", size, "", "", "", refusal.reason])
    return lines


def _axes(mesh: MeshConfig) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1) or "1 device"


def _attention(each: Suggestion) -> str:
    sizes = each.sizes
    if sizes.attention_strategy == "hybrid":
        return f"ring of {sizes.ring_size} x ulysses of {sizes.exchange_size}"
    return "blockwise" if sizes.mesh.sp == 1 else f"{sizes.attention_strategy} of {sizes.mesh.sp}"


def write_results(
    config: PlanConfig, found: Suggestions, timelines: dict[str, Timeline], hardware: Hardware, machine: Machine
) -> None:
    """All meshes as CSV, the best as a table, the timeline's picture, and what they were made of."""
    config.output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["dp", "fsdp", "tp", "sp", "attention", "saved_activations", "weights_over_ring", "bytes", "seconds", "mfu"]
    )
    for each in found.fitting:
        mesh, request = each.sizes.mesh, each.sizes.request
        writer.writerow(
            [
                *dataclasses.astuple(mesh),
                _attention(each),
                each.sizes.transformer.saved_activations,
                request.weights_over_ring,
                each.memory.total,
                each.time.seconds,
                each.time.utilisation,
            ]
        )
    write_whole(config.output / "meshes.csv", text.getvalue())
    write_whole(config.output / "table.md", markdown_table(mesh_rows(found, config.shown)))
    if timelines:
        with atomic_file(config.output / "timeline.png", overwrite=True) as temporary:
            draw_timelines(timelines, devices_drawn=config.timeline.devices_drawn).savefig(temporary, dpi=130)
    best = found.fitting[0]
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "hardware": dataclasses.asdict(hardware),
        "memory_bytes": machine.memory_bytes,
        "best": {
            "mesh": dataclasses.asdict(best.sizes.mesh),
            "attention": _attention(best),
            "context": best.sizes.request.context,
            "microbatches": best.sizes.microbatches,
            "memory": best.memory.parts,
            "moment": best.memory.moment,
            "seconds": best.time.parts(),
            "utilisation": best.time.utilisation,
            "days": days_for(config.token_budget, best.time),
        },
        "timeline_seconds": {title: timeline.seconds for title, timeline in timelines.items()},
        "commit": git_commit(),
        "versions": versions("ring_rl", "jax", "jaxlib"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def show(
    config: PlanConfig, found: Suggestions, hardware: Hardware, machine: Machine, timelines: dict[str, Timeline]
) -> None:
    """The tables on the console."""
    console = Console(width=max(150, Console().width))
    lines = mesh_rows(found, config.shown)
    title = f"{len(found.fitting)} of {len(found.fitting) + len(found.refused)} meshes fit {machine.name}"
    table = Table(*lines[0], title=title)
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)
    best = found.fitting[0]
    time, memory = best.time, best.memory
    facts = Table("the fastest", "", title=f"{_axes(best.sizes.mesh)}, {_attention(best)}")
    facts.add_row("parameters", f"{best.sizes.parameters():,}")
    facts.add_row("context", f"{best.sizes.request.context:,} tokens, {best.sizes.tokens:,} a device")
    facts.add_row("microbatches", f"{best.sizes.microbatches} of {best.sizes.request.batch_size} sequences")
    for name, size in memory.parts.items():
        facts.add_row(f"memory: {name}", f"{size / 2**30:.3f} GiB")
    estimate = " (estimate)" if machine.estimated else ""
    facts.add_row(f"memory: peak{estimate}", f"{memory.total / 2**30:.3f} GiB, during {memory.moment}")
    for name, seconds in time.parts().items():
        facts.add_row(f"time: {name}", f"{seconds:.3g} s")
    facts.add_row("time: a step", f"{time.seconds:.3g} s, {time.tokens_per_second:,.0f} tokens/s")
    facts.add_row("model FLOPs a step", f"{time.model_flops:.3e}, {time.utilisation:.1%} of the devices' peak")
    facts.add_row("FLOPs a device", f"{time.product_flops:.3e} products, {time.attention_flops:.3e} attention")
    if time.overlap is not None and time.hop_bytes is not None:
        overlap = time.overlap
        facts.add_row("bytes a hop", f"{time.hop_bytes.forward:,} forward, {time.hop_bytes.backward:,} backward")
        facts.add_row(
            "a hop hides",
            f"{'yes' if overlap.hides else 'no'}: {1e3 * overlap.forward_hop_seconds:.3g} ms behind "
            f"{1e3 * overlap.forward_block_seconds:.3g} forward, {1e3 * overlap.backward_hop_seconds:.3g} behind "
            f"{1e3 * overlap.backward_block_seconds:.3g} backward",
        )
    days = days_for(config.token_budget, time)
    facts.add_row(f"days for {config.token_budget:.3g} tokens", f"{days:,.2f}")
    for title, timeline in timelines.items():
        facts.add_row(f"a layer's ring, {title}", f"{1e3 * timeline.seconds:.3g} ms, {timeline.idle_share:.0%} idle")
    console.print(facts)
    rates = config.rates
    console.print(
        f"Assumed: {hardware.name}, {hardware.flops_per_second:.3g} FLOP/s, of which products reach "
        f"{rates.products_share:.0%} and attention {rates.attention_share:.0%}; "
        f"{hardware.neighbour_bytes_per_second:.3g} bytes/s to a neighbour, of which {rates.link_share:.0%}; gathers "
        f"{'hide behind products' if rates.gathers_overlap else 'hide behind nothing'}. {hardware.source}."
    )


def last_line(config: PlanConfig, best: Suggestion, machine: Machine, timelines: dict[str, Timeline]) -> str:
    """name=value, for programs."""
    mesh, time = best.sizes.mesh, best.time
    figures = [
        *(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items()),
        f"strategy={best.sizes.attention_strategy}",
        f"saved_activations={best.sizes.transformer.saved_activations}",
        f"memory_gib={best.memory.total / 2**30:.3f}",
        f"available_gib={machine.memory_bytes / 2**30:.3f}",
        f"step_seconds={time.seconds:.4g}",
        f"mfu={time.utilisation:.3f}",
        f"days={days_for(config.token_budget, time):.4g}",
        f"hop_hides={'none' if time.overlap is None else str(time.overlap.hides).lower()}",
    ]
    if timelines:
        even = timelines["forward, all alike"].seconds
        figures.append(f"slow_device_factor={timelines['forward, slow devices'].seconds / even:.3f}")
        figures.append(f"slow_link_factor={timelines['forward, slow links'].seconds / even:.3f}")
    return " ".join(figures)


@hydra.main(config_path="../conf", config_name="plan", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a plan."""
    with exit_on_bad_input():
        config = from_mapping(PlanConfig, resolve(cfg))
        print(plan(config)[1])


if __name__ == "__main__":
    run_entry_point(main)
