"""The device mesh: axis "dp" splits the batch, axis "sp" splits the sequence into a ring."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ring_rl.typing import PyTree

__all__ = [
    "MeshConfig",
    "batch_sharding",
    "describe_mesh",
    "make_mesh",
    "replicated",
    "request_virtual_devices",
    "shard_batch",
]

AXIS_NAMES = ("dp", "sp")
_VIRTUAL_DEVICES_FLAG = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 on one of them takes all devices that the other leaves.

    Attributes:
        dp: data parallelism, the number of shards of the batch axis.
        sp: sequence parallelism, the ring size.
    """

    dp: int
    sp: int

    def __post_init__(self) -> None:
        for axis, size in (("dp", self.dp), ("sp", self.sp)):
            if size != -1 and size < 1:
                raise ValueError(f"mesh axis {axis} must be at least 1, or -1 for all devices left, got {size}")
        if self.dp == -1 and self.sp == -1:
            raise ValueError("only one mesh axis can be -1, got dp=-1 and sp=-1; give the other its size")


def make_mesh(config: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ("dp", "sp") over the first dp * sp devices.

    Neighbours along "sp" are neighbours in `devices`, so a ring's hops stay between adjacent devices.

    Raises:
        ValueError: more devices are asked for than there are, or -1 leaves a remainder.
    """
    available = list(jax.devices() if devices is None else devices)
    dp, sp = config.dp, config.sp
    if -1 in (dp, sp):
        fixed = sp if dp == -1 else dp
        if len(available) >= fixed and len(available) % fixed:
            raise ValueError(
                f"{len(available)} devices cannot be divided into groups of {fixed}; choose a divisor of "
                f"{len(available)} for the mesh axis {'sp' if dp == -1 else 'dp'}"
            )
        rest = max(len(available) // fixed, 1)
        dp, sp = (rest, sp) if dp == -1 else (dp, rest)
    if dp * sp > len(available):
        platform = available[0].platform if available else "cpu"
        remedy = f"lower dp or sp to a product of {len(available)}"
        if platform == "cpu":
            remedy += f", or set XLA_FLAGS={_VIRTUAL_DEVICES_FLAG}={dp * sp} for that many virtual devices"
        raise ValueError(
            f"mesh dp={dp} x sp={sp} needs {dp * sp} devices, but there are {len(available)} ({platform}); {remedy}"
        )
    grid = np.asarray(available[: dp * sp], dtype=object).reshape(dp, sp)
    return Mesh(grid, AXIS_NAMES, axis_types=(AxisType.Auto, AxisType.Auto))


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


def batch_sharding(mesh: Mesh, batch: PyTree[Any]) -> PyTree[NamedSharding]:
    """The sharding of each leaf of a batch: [B, T, ...] by ("dp", "sp"), [B] by "dp", scalars replicated.

    Raises:
        ValueError: the batch or the sequence length is not divisible by its mesh axis.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = AXIS_NAMES[: min(np.ndim(leaf), 2)]
        for axis, length, what in zip(axes, np.shape(leaf), ("batch size", "sequence length"), strict=False):
            size = mesh.shape[axis]
            if length % size:
                raise ValueError(
                    f"{what} {length} of batch{jax.tree_util.keystr(path)} is not divisible by the mesh axis "
                    f"{axis}={size}; pad it to {-(-length // size) * size}"
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding_of, batch)


def shard_batch(mesh: Mesh, batch: PyTree[Any]) -> PyTree[jax.Array]:
    """Place a host batch on the mesh, each device receiving its shard only; see `batch_sharding`.

    With several processes every one of them passes the same whole batch.
    """
    return jax.device_put(batch, batch_sharding(mesh, batch))
