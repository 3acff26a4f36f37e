"""What a training would need, known before any of it is made: the step is compiled and never run."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from ring_rl.kernels.hardware import VIRTUAL_CPU, hardware_for
from ring_rl.training.mesh import describe_mesh
from ring_rl.training.step import TrainStep
from ring_rl.typing import PyTree

__all__ = ["DryRun", "device_memory", "dry_run", "needed_bytes", "print_dry_run", "sharded_bytes"]

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """One row of facts about a training step.

    Attributes:
        mesh: in words.
        parameters: numbers that are trained, over all devices.
        tokens: of the global batch.
        model_flops: of a step, over all devices; None where nobody counted.
        state_bytes: of parameters and optimizer on one device.
        needed_bytes: most that one device holds while a step runs; None where the compiler ran out of memory.
        available_bytes: of one device; None where unknown.
        available_source: where `available_bytes` is from.
        compiler_message: what the compiler said where it refused.
    """

    mesh: str
    parameters: int
    tokens: int
    model_flops: int | None
    state_bytes: int
    needed_bytes: int | None
    available_bytes: int | None
    available_source: str
    compiler_message: str | None

    @property
    def fits(self) -> bool | None:
        """Whether a device has the memory; None where its memory is unknown."""
        if self.needed_bytes is None:
            return False
        return None if self.available_bytes is None else self.needed_bytes <= self.available_bytes

    def summary(self) -> str:
        """One line of name=value, for programs to read."""
        fits = {True: "true", False: "false", None: "unknown"}[self.fits]
        values = {
            "parameters": self.parameters,
            "tokens_per_step": self.tokens,
            "model_flops_per_step": self.model_flops,
            "state_bytes": self.state_bytes,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "fits": fits,
        }
        return " ".join(f"{name}={'unknown' if value is None else value}" for name, value in values.items())


def dry_run(
    step: TrainStep,
    state: Any,
    batch: Any,
    *,
    mesh: Mesh,
    tokens: int,
    model_flops: int | None,
    device_memory_gib: float | None,
) -> DryRun:
    """Compile the step for these shapes, allocating nothing, and report what it needs.

    Args:
        step: as from `make_train_step`.
        state: as from `abstract_state` (or a real one).
        batch: `jax.ShapeDtypeStruct`s with the shardings of `batch_sharding` (or real arrays).
        mesh: that the step runs on.
        tokens: of the global batch.
        model_flops: as from `model_flops_per_step`.
        device_memory_gib: memory of one device; None asks `device_memory`.

    Raises:
        ValueError: the batch does not fit the mesh, or the backend does not analyse memory.
    """
    if device_memory_gib is not None and not device_memory_gib > 0:
        raise ValueError(f"device_memory_gib must be positive, got {device_memory_gib}; null asks the device")
    needed, message = None, None
    lowered = step.lower(state, batch)
    try:
        needed = needed_bytes(lowered.compile(), platform=mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        # TPU compilers refuse a program that cannot fit, and say by how much; anything else is not ours to explain.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = " ".join(re.sub(r"RESOURCE_EXHAUSTED:?", "", str(error)).split())[:300]
    if device_memory_gib is None:
        available, source = device_memory(mesh.devices.flat[0])
    else:
        available, source = int(device_memory_gib * _GIB), "configured"
    return DryRun(
        mesh=describe_mesh(mesh),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.parameters)),
        tokens=tokens,
        model_flops=model_flops,
        state_bytes=sharded_bytes(state),
        needed_bytes=needed,
        available_bytes=available,
        available_source=source,
        compiler_message=message,
    )


def needed_bytes(compiled: jax.stages.Compiled, *, platform: str) -> int:
    """The most memory that a device holds while the program runs, its arguments included.

    On TPUs the compiler's own peak. Elsewhere arguments, outputs that do not take the place of an argument, and
    temporaries, which are allocated as one block before the program starts; the peak that XLA reports for CPUs
    leaves temporaries out.

    Raises:
        ValueError: the backend does not analyse memory.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError(f"the backend {platform} does not report the memory of a program; use cpu, gpu or tpu")
    if platform == "tpu":
        return int(memory.peak_memory_in_bytes)
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def sharded_bytes(tree: PyTree[Any]) -> int:
    """What one device holds of arrays, or of shapes, that say how they are laid out."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_memory(device: jax.Device) -> tuple[int | None, str]:
    """Bytes that a program can have on a device, and where the figure is from; None where nobody knows."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"]), "reported by the device"
    if device.platform == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        count = len([other for other in jax.local_devices() if other.platform == "cpu"])
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // max(count, 1), f"this machine's memory over {count} CPU device{'s' if count != 1 else ''}"
    hardware = hardware_for(device.device_kind)
    if hardware is VIRTUAL_CPU:
        return None, f"unknown for {device.device_kind}; set device_memory_gib"
    return int(hardware.memory_bytes), f"data sheet of {hardware.name}"


def print_dry_run(report: DryRun, *, console: Console | None = None) -> None:
    """A table for people, then `DryRun.summary` as the last line."""
    table = Table(title=f"dry run: {report.mesh}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("parameters", f"{report.parameters:,}", "over all devices")
    table.add_row("tokens a step", f"{report.tokens:,}", "over all devices")
    flops = "not counted" if report.model_flops is None else f"{report.model_flops:.3e}"
    table.add_row("model FLOPs a step", flops, "over all devices, causal attention counted once")
    table.add_row("state", _gib(report.state_bytes), "a device: parameters and optimizer")
    needed = "more than there is" if report.needed_bytes is None else _gib(report.needed_bytes)
    table.add_row("memory needed", needed, "a device: state, batch and all that a step makes")
    available = "unknown" if report.available_bytes is None else _gib(report.available_bytes)
    table.add_row("memory available", available, f"a device: {report.available_source}")
    verdict = {True: "[green]yes", False: "[red]no", None: "[yellow]unknown"}[report.fits]
    table.add_row("fits", verdict, report.compiler_message or "")
    console = console or Console()
    console.print(table)
    console.print(report.summary(), soft_wrap=True, highlight=False, markup=False)


def _gib(size: int) -> str:
    return f"{size / _GIB:.3f} GiB"
