from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ring_rl.training.mesh import (
    MeshConfig,
    batch_sharding,
    describe_mesh,
    make_mesh,
    shard_batch,
)


def mesh_config(dp=1, fsdp=1, tp=1, sp=1) -> MeshConfig:
    return MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=sp)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, 1, 1, 8), (1, 1, 1, 8)),
        ((1, 2, 2, 2), (1, 2, 2, 2)),
        ((-1, 1, 1, 2), (4, 1, 1, 2)),
        ((2, -1, 2, 1), (2, 2, 2, 1)),
        ((1, 1, -1, 1), (1, 1, 8, 1)),
        ((2, 2, 1, -1), (2, 2, 1, 2)),
        ((1, 1, 1, 2), (1, 1, 1, 2)),
    ],
)
def test_axes_and_sizes(sizes, shape):
    mesh = make_mesh(mesh_config(*sizes))
    assert mesh.axis_names == ("dp", "fsdp", "tp", "sp")
    assert mesh.devices.shape == shape
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


def test_devices_can_be_named():
    devices = jax.devices()[4:6]
    assert list(make_mesh(mesh_config(sp=-1), devices=devices).devices.flat) == devices


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 1, 1, 8), "mesh dp=2 x fsdp=1 x tp=1 x sp=8 needs 16 devices, but there are 8 (cpu); lower dp, fsdp"),
        ((2, 1, 1, 8), "XLA_FLAGS=--xla_force_host_platform_device_count=16"),
        ((-1, 1, 1, 16), "mesh dp=1 x fsdp=1 x tp=1 x sp=16 needs 16 devices, but there are 8"),
        ((3, 1, 1, -1), "into groups of 3; choose a divisor of 8 for the product of the mesh axes dp"),
        ((3, 2, -1, 1), "into groups of 6; choose a divisor of 8 for the product of the mesh axes dp, fsdp"),
    ],
)
def test_too_many_or_indivisible_devices(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(mesh_config(*sizes))


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, -2, 1, 1), (1, 1, 0, 1), (-1, 1, 1, -1), (1, -1, -1, 1)])
def test_impossible_configs(sizes):
    with pytest.raises(ValueError, match="mesh ax"):
        mesh_config(*sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as the order of a mesh depends on."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(slices: int) -> list[Chip]:
    """`slices` slices of 4 x 2 chips."""
    return [
        Chip(8 * s + 4 * y + x, coords=(x, y, 0), slice_index=s, process_index=2 * s + y)
        for s in range(slices)
        for y in range(2)
        for x in range(4)
    ]


def test_a_ring_of_tpus_follows_their_links():
    ring = list(make_mesh(mesh_config(sp=-1), devices=chips(1)).devices.flat)
    links = [sum(abs(a - b) for a, b in zip(ring[i].coords, ring[(i + 1) % 8].coords, strict=True)) for i in range(8)]
    assert links == [1] * 8


@pytest.mark.parametrize("sizes", [(2, 1, 2, 4), (4, 1, 1, 4), (1, 2, 1, 8), (2, 2, 1, 4)])
def test_only_the_batch_axes_span_slices(sizes):
    grid = make_mesh(mesh_config(*sizes), devices=chips(2)).devices
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    assert {chip.id for chip in grid.flat} == set(range(16))
    np.testing.assert_array_equal(slices, slices[:, :, :1, :1] + np.zeros(sizes, int))


def test_a_slice_boundary_inside_a_ring_is_refused():
    with pytest.raises(ValueError, match=r"2 TPU slices cannot be split over dp=1 x fsdp=1; make dp a multiple of 2"):
        make_mesh(mesh_config(sp=16), devices=chips(2))


def test_no_process_may_be_left_without_a_device():
    devices = [dataclasses.replace(chip, platform="gpu") for chip in chips(1)]
    with pytest.raises(ValueError, match=r"needs 4 of 8 devices and leaves process 1 without any; set one axis to -1"):
        make_mesh(mesh_config(sp=4), devices=devices)


def test_description_is_one_line():
    assert describe_mesh(make_mesh(mesh_config(sp=8))) == "mesh dp=1 x fsdp=1 x tp=1 x sp=8 over 8 cpu devices"
    assert describe_mesh(make_mesh(mesh_config())) == "mesh dp=1 x fsdp=1 x tp=1 x sp=1 over 1 cpu device"


def test_each_leaf_is_sharded_by_its_rank():
    mesh = make_mesh(mesh_config(dp=2, sp=4))
    batch = {
        "observations": np.zeros((4, 8, 3), np.float32),
        "tokens": np.zeros((4, 8), np.int32),
        "target_return": np.zeros(4, np.float32),
        "scale": np.float32(1),
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, batch_sharding(mesh, batch))
    assert specs == {
        "observations": PartitionSpec(("dp", "fsdp"), "sp"),
        "tokens": PartitionSpec(("dp", "fsdp"), "sp"),
        "target_return": PartitionSpec(("dp", "fsdp")),
        "scale": PartitionSpec(),
    }


def test_each_device_receives_its_shard_only():
    mesh = make_mesh(mesh_config(dp=2, fsdp=2, sp=2))
    tokens = np.arange(4 * 8).reshape(4, 8)
    placed = shard_batch(mesh, {"tokens": tokens})["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 4)}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8), "batch size 3 of batch['tokens'] is not divisible by dp=2 x fsdp=2; pad it to 4"),
        (
            (4, 9),
            "sequence length 9 of batch['tokens'] is not divisible by sp=2; pad it to 10",
        ),
    ],
)
def test_indivisible_batches_name_the_leaf_and_the_padding(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shard_batch(make_mesh(mesh_config(dp=2, fsdp=2, sp=2)), {"tokens": np.zeros(shape)})


def run_python(source: str, *, flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("flags", "expected"), [("", 3), ("--xla_force_host_platform_device_count=2", 2)])
def test_virtual_devices_before_the_backend_starts(flags, expected):
    source = (
        "from ring_rl.training.mesh import request_virtual_devices; import jax\n"
        "request_virtual_devices(3); print(jax.device_count())"
    )
    result = run_python(source, flags=flags)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == expected


def test_virtual_devices_after_the_backend_has_started():
    source = (
        "from ring_rl.training.mesh import request_virtual_devices; import jax\n"
        "request_virtual_devices(3); jax.devices(); request_virtual_devices(2); request_virtual_devices(4)"
    )
    result = run_python(source, flags="")
    message = "ValueError: 4 virtual devices were asked for, but JAX already runs with 3; set XLA_FLAGS="
    assert result.stderr.splitlines()[-1].startswith(message)
