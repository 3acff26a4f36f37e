"""Machines by name: TPU slices as Google and the paper call them, and nodes of GPUs.

v4-1024, v5p-256    the number counts TensorCores, two a chip (and so does v3's)
v5e-256, v6e-256    the number counts chips; v5litepod-256 is v5e-256
gpu:8xA100-80GB     eight GPUs of 80 GB, whatever they are called
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ring_rl.training.mesh import request_virtual_devices

__all__ = [
    "TPU_SLICES",
    "GpuNode",
    "Machine",
    "TpuSlice",
    "describe_topology",
    "devices_of",
    "generation_of",
    "machine_named",
    "require_libtpu",
    "smallest_slice",
    "tpu_slice",
]

_GIB = 2**30
# libtpu looks for a TPU, and for the machine it would be in, unless it is told not to; and it lets one process of a
# machine at a time in, which serves real TPUs and hinders compiling.
_NO_TPU_HERE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generation:
    """What all slices of a generation share.

    `memory_gib` is what libtpu 0.0.42 names as available to a program, read from its refusals; data sheets say a
    little more.
    """

    memory_gib: float
    counts_cores: bool
    devices_per_chip: int
    topologies: tuple[str, ...]


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_GENERATIONS: Mapping[str, _Generation] = {
    "v3": _Generation(
        memory_gib=15.48,
        counts_cores=True,
        devices_per_chip=2,
        topologies=("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
    ),
    "v4": _Generation(memory_gib=30.75, counts_cores=True, devices_per_chip=1, topologies=_CUBES),
    "v5e": _Generation(memory_gib=15.75, counts_cores=False, devices_per_chip=1, topologies=_SQUARES),
    "v5p": _Generation(
        memory_gib=95.74, counts_cores=True, devices_per_chip=1, topologies=(*_CUBES, "16x16x16", "16x16x24")
    ),
    "v6e": _Generation(memory_gib=31.25, counts_cores=False, devices_per_chip=1, topologies=_SQUARES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuSlice:
    """A standard slice of a TPU pod.

    Attributes:
        name: As above.
        generation: "v3", "v4", "v5e", "v5p" or "v6e".
        chips: Chips.
        topology: Their grid, as libtpu names it: "v5e:16x16".
        megacore: Whether the two cores of a chip are one device by choice, as v4 is used; libtpu has to be told.
        devices: What JAX sees: chips, or on v3 cores.
        memory_bytes: Of one device, what a program can have.
    """

    name: str
    generation: str
    chips: int
    topology: str
    megacore: bool
    devices: int
    memory_bytes: int

    @property
    def estimated(self) -> bool:
        """Programs are compiled by the TPU's own compiler."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuNode:
    """Some GPUs. Programs are compiled for as many CPU devices: what they need is an estimate.

    Attributes:
        name: As above.
        generation: What a GPU is called.
        devices: GPUs.
        memory_bytes: Of one of them, by its data sheet.
    """

    name: str
    generation: str
    devices: int
    memory_bytes: int

    @property
    def estimated(self) -> bool:
        """Programs are not compiled by the GPU's compiler."""
        return True


Machine = TpuSlice | GpuNode


def _slices() -> dict[str, TpuSlice]:
    found = {}
    for generation, facts in _GENERATIONS.items():
        for grid in facts.topologies:
            chips = math.prod(int(edge) for edge in grid.split("x"))
            name = f"{generation}-{2 * chips if facts.counts_cores else chips}"
            found[name] = TpuSlice(
                name=name,
                generation=generation,
                chips=chips,
                topology=f"{generation}:{grid}",
                megacore=generation == "v4",
                devices=chips * facts.devices_per_chip,
                memory_bytes=int(facts.memory_gib * _GIB),
            )
    return found


TPU_SLICES: Mapping[str, TpuSlice] = _slices()


def tpu_slice(name: str) -> TpuSlice:
    """The slice of that name.

    Raises:
        ValueError: There is none; the error lists those of its generation.
    """
    name = re.sub(r"^v5litepod-", "v5e-", name.strip().casefold())
    if name in TPU_SLICES:
        return TPU_SLICES[name]
    generation = generation_of(name)
    if generation is None:
        near = difflib.get_close_matches(name, TPU_SLICES, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"unknown TPU slice {name!r}; {guess}name one of {', '.join(_GENERATIONS)} and its size, such as v5e-256"
        )
    known = [each for each in TPU_SLICES if TPU_SLICES[each].generation == generation]
    counted = "TensorCores, two a chip" if _GENERATIONS[generation].counts_cores else "chips"
    raise ValueError(f"unknown TPU slice {name!r}; slices of {generation} (counted in {counted}): {', '.join(known)}")


def machine_named(name: str) -> Machine:
    """The TPU slice or the node of GPUs of that name.

    Raises:
        ValueError: There is none.
    """
    name = name.strip()
    if not name.casefold().startswith("gpu:"):
        return tpu_slice(name)
    parts = re.fullmatch(r"gpu:(\d+)x([\w.-]+)-(\d+)GB", name, re.IGNORECASE)
    if parts is None or int(parts[1]) < 1 or int(parts[3]) < 1:
        raise ValueError(f"cannot read {name!r}; name GPUs by number, kind and memory, such as gpu:8xA100-80GB")
    devices, kind, gigabytes = int(parts[1]), parts[2], int(parts[3])
    return GpuNode(
        name=f"gpu:{devices}x{kind}-{gigabytes}GB",
        generation=kind,
        devices=devices,
        memory_bytes=gigabytes * 10**9,
    )


def generation_of(name: str) -> str | None:
    """The generation of TPUs that a name such as "v5e-24" begins with; None where it is none of ours."""
    return next((each for each in _GENERATIONS if name.startswith(f"{each}-")), None)


def smallest_slice(generation: str, *, devices: int) -> TpuSlice | None:
    """The smallest standard slice of a generation with at least so many devices; None where none is that large."""
    fitting = [each for each in TPU_SLICES.values() if each.generation == generation and each.devices >= devices]
    return min(fitting, key=lambda each: each.devices, default=None)


def devices_of(machine: Machine) -> list[Any]:
    """Devices to build a mesh of: of a slice that is not here, or as many CPU devices as the node has GPUs.

    Call it before anything runs on JAX.

    Raises:
        ImportError: libtpu is not installed.
        ValueError: libtpu does not know the topology, or JAX runs already, with fewer CPU devices.
    """
    if isinstance(machine, TpuSlice):
        return describe_topology(machine.topology)
    # Beside an accelerator the blocks for it would be chosen.
    jax.config.update("jax_platforms", "cpu")
    request_virtual_devices(machine.devices)
    present: Sequence[Any] = jax.devices("cpu")
    if len(present) < machine.devices:
        raise ValueError(
            f"{machine.name} needs {machine.devices} CPU devices and there are {len(present)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={machine.devices} before the program starts"
        )
    return list(present)[: machine.devices]


def describe_topology(topology: str) -> list[Any]:
    """The devices of a grid of TPU chips that is not here, by libtpu's name of it: "v5e:2x4".

    Raises:
        ImportError: libtpu is not installed.
        ValueError: libtpu does not know the topology.
    """
    require_libtpu()
    from jax.experimental import topologies

    os.environ.update({key: value for key, value in _NO_TPU_HERE.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # libtpu raises what it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"libtpu cannot describe topology {topology!r}: {reason}") from None


def require_libtpu() -> None:
    """Raises ImportError unless libtpu is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu is not installed; install the extra: pip install -e '.[tpu-compile]'")
