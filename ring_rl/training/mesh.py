"""The device mesh: axes "dp" and "fsdp" split the batch, "tp" the heads, "sp" the sequence into a ring.

"fsdp" also splits the parameters (`ring_rl.training.sharding`); "dp" repeats them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ring_rl.typing import PyTree

__all__ = [
    "AXIS_NAMES",
    "BATCH_AXES",
    "SEQUENCE_AXIS",
    "MeshConfig",
    "batch_sharding",
    "describe_mesh",
    "make_mesh",
    "replicated",
    "request_virtual_devices",
    "shard_batch",
    "with_shardings",
]

# From the outermost axis to the innermost one, whose neighbours are neighbouring devices.
AXIS_NAMES = ("dp", "fsdp", "tp", "sp")
BATCH_AXES = ("dp", "fsdp")
SEQUENCE_AXIS = "sp"
_VIRTUAL_DEVICES_FLAG = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 on one of them takes all devices that the others leave.

    Attributes:
        dp: data parallelism: shards of the batch, each with all the parameters.
        fsdp: fully sharded data parallelism: shards of the batch and of the parameters.
        tp: tensor parallelism: shards of the heads, of the feed-forward width and of the vocabulary.
        sp: sequence parallelism, the ring size.
    """

    dp: int
    fsdp: int
    tp: int
    sp: int

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh axis {axis} must be at least 1, or -1 for all devices left, got {size}")
        if len(open_axes := [f"{axis}=-1" for axis, size in sizes.items() if size == -1]) > 1:
            raise ValueError(f"only one mesh axis can be -1, got {' and '.join(open_axes)}; give the others their size")


def make_mesh(config: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ("dp", "fsdp", "tp", "sp") over the first dp * fsdp * tp * sp devices.

    Neighbours along "sp" are neighbours in `devices`, so a ring stays inside a host before it spans hosts. On
    TPUs that the mesh fills, JAX's `mesh_utils` orders the devices by their physical torus, and where they form
    several slices, "dp" (then "fsdp") spans the slices, whose network is the slow one.

    Raises:
        ValueError: more devices are asked for than there are, -1 leaves a remainder, a process would have no
            device, or the slices of a TPU cannot be split over dp and fsdp.
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = _sizes(config, len(available))
    product = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    count = math.prod(sizes.values())
    platform = available[0].platform if available else "cpu"
    if count > len(available):
        remedy = f"lower dp, fsdp, tp or sp to a product of {len(available)}"
        if platform == "cpu":
            remedy += f", or set XLA_FLAGS={_VIRTUAL_DEVICES_FLAG}={count} for that many virtual devices"
        raise ValueError(f"mesh {product} needs {count} devices, but there are {len(available)} ({platform}); {remedy}")
    if idle := sorted({d.process_index for d in available} - {d.process_index for d in available[:count]}):
        raise ValueError(
            f"mesh {product} needs {count} of {len(available)} devices and leaves process {idle[0]} without any; "
            f"set one axis to -1, which takes all devices, or start fewer processes"
        )
    if platform == "tpu" and count == len(available):
        grid = _torus_order(tuple(sizes.values()), available)
    else:
        grid = np.asarray(available[:count], dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXIS_NAMES, axis_types=(AxisType.Auto,) * len(AXIS_NAMES))


def _sizes(config: MeshConfig, available: int) -> dict[str, int]:
    """The size of each axis, with -1 resolved."""
    sizes = dataclasses.asdict(config)
    for axis in [axis for axis, size in sizes.items() if size == -1]:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if available >= fixed and available % fixed:
            others = ", ".join(other for other in sizes if other != axis and sizes[other] > 1)
            raise ValueError(
                f"{available} devices cannot be divided into groups of {fixed}; choose a divisor of "
                f"{available} for the product of the mesh axes {others}"
            )
        sizes[axis] = max(available // fixed, 1)
    return sizes


def _torus_order(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """TPU devices as a grid whose inner axes lie along the links of the torus, and whose outer ones span slices."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    dp, fsdp, *inner = shape
    dp_slices = math.gcd(dp, slices)
    fsdp_slices = slices // dp_slices
    if fsdp % fsdp_slices:
        raise ValueError(
            f"{slices} TPU slices cannot be split over dp={dp} x fsdp={fsdp}; "
            f"make dp a multiple of {slices}, because only dp and fsdp may span slices"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (dp // dp_slices, fsdp // fsdp_slices, *inner),
        (dp_slices, fsdp_slices, *(1 for _ in inner)),
        devices,
        allow_split_physical_axes=True,
    )


def request_virtual_devices(count: int) -> None:
    """Make the CPU backend show `count` devices; call it before any JAX operation runs.

    A count that the user set in XLA_FLAGS is left alone, and `make_mesh` says so where it is too small.
    Beside an accelerator this changes nothing that a mesh sees, because it concerns CPU devices only.

    Raises:
        ValueError: the backend already runs with fewer CPU devices.
    """
    if count < 1:
        raise ValueError(f"the number of virtual devices must be at least 1, got {count}")
    if _VIRTUAL_DEVICES_FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        # JAX refuses the option once a backend runs.
        present = len(jax.devices("cpu"))
        if present < count:
            raise ValueError(
                f"{count} virtual devices were asked for, but JAX already runs with {present}; "
                f"set XLA_FLAGS={_VIRTUAL_DEVICES_FLAG}={count} before the program starts"
            ) from None


def describe_mesh(mesh: Mesh) -> str:
    """One line for logs: "mesh dp=1 x sp=8 over 8 cpu devices"."""
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].platform
    return f"mesh {axes} over {mesh.size} {kind} device{'s' if mesh.size != 1 else ''}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device of `mesh` holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch: PyTree[Any], *, accumulation_steps: int = 1) -> PyTree[NamedSharding]:
    """The sharding of each leaf of a batch: [B, T, ...] by (("dp", "fsdp"), "sp"), [B] by ("dp", "fsdp").

    Scalars are replicated, and so is everything over "tp".

    Args:
        mesh: as from `make_mesh`.
        batch: arrays or abstract values.
        accumulation_steps: microbatches that the rows of every device will be cut into; for the check only.

    Raises:
        ValueError: the batch or the sequence length is not divisible by its mesh axes.
    """
    rows = {axis: mesh.shape[axis] for axis in BATCH_AXES}
    if accumulation_steps > 1:
        rows["accumulation_steps"] = accumulation_steps
    rules = (("batch size", rows), ("sequence length", {SEQUENCE_AXIS: mesh.shape[SEQUENCE_AXIS]}))

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for length, (what, sizes) in zip(np.shape(leaf), rules, strict=False):
            size = math.prod(sizes.values())
            if length % size:
                product = " x ".join(f"{name}={value}" for name, value in sizes.items())
                raise ValueError(
                    f"{what} {length} of batch{jax.tree_util.keystr(path)} is not divisible by {product}; "
                    f"pad it to {-(-length // size) * size}"
                )
        return NamedSharding(mesh, PartitionSpec(*(BATCH_AXES, SEQUENCE_AXIS)[: min(np.ndim(leaf), 2)]))

    return jax.tree_util.tree_map_with_path(sharding_of, batch)


def with_shardings(tree: PyTree[Any], shardings: PyTree[NamedSharding]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and types of `tree`, laid out so, for compiling ahead of the arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def shard_batch(mesh: Mesh, batch: PyTree[Any]) -> PyTree[jax.Array]:
    """Place a host batch on the mesh, each device receiving its shard only; see `batch_sharding`.

    With several processes every one of them passes the same whole batch.
    """
    return jax.device_put(batch, batch_sharding(mesh, batch))
