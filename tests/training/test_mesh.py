from __future__ import annotations

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


@pytest.mark.parametrize(
    ("dp", "sp", "shape"), [(1, 8, (1, 8)), (2, 4, (2, 4)), (-1, 2, (4, 2)), (2, -1, (2, 4)), (1, 2, (1, 2))]
)
def test_axes_and_sizes(dp, sp, shape):
    mesh = make_mesh(MeshConfig(dp=dp, sp=sp))
    assert mesh.axis_names == ("dp", "sp")
    assert mesh.devices.shape == shape
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


def test_devices_can_be_named():
    devices = jax.devices()[4:6]
    assert list(make_mesh(MeshConfig(dp=1, sp=-1), devices=devices).devices.flat) == devices


@pytest.mark.parametrize(
    ("dp", "sp", "message"),
    [
        (2, 8, "mesh dp=2 x sp=8 needs 16 devices, but there are 8 (cpu); lower dp or sp"),
        (2, 8, "XLA_FLAGS=--xla_force_host_platform_device_count=16"),
        (-1, 16, "mesh dp=1 x sp=16 needs 16 devices, but there are 8"),
        (3, -1, "8 devices cannot be divided into groups of 3; choose a divisor of 8 for the mesh axis dp"),
    ],
)
def test_too_many_or_indivisible_devices(dp, sp, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(MeshConfig(dp=dp, sp=sp))


@pytest.mark.parametrize(("dp", "sp"), [(0, 1), (1, -2), (-1, -1)])
def test_impossible_configs(dp, sp):
    with pytest.raises(ValueError, match="mesh ax"):
        MeshConfig(dp=dp, sp=sp)


def test_description_is_one_line():
    assert describe_mesh(make_mesh(MeshConfig(dp=1, sp=8))) == "mesh dp=1 x sp=8 over 8 cpu devices"
    assert describe_mesh(make_mesh(MeshConfig(dp=1, sp=1))) == "mesh dp=1 x sp=1 over 1 cpu device"


def test_each_leaf_is_sharded_by_its_rank():
    mesh = make_mesh(MeshConfig(dp=2, sp=4))
    batch = {
        "observations": np.zeros((4, 8, 3), np.float32),
        "tokens": np.zeros((4, 8), np.int32),
        "target_return": np.zeros(4, np.float32),
        "scale": np.float32(1),
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, batch_sharding(mesh, batch))
    assert specs == {
        "observations": PartitionSpec("dp", "sp"),
        "tokens": PartitionSpec("dp", "sp"),
        "target_return": PartitionSpec("dp"),
        "scale": PartitionSpec(),
    }


def test_each_device_receives_its_shard_only():
    mesh = make_mesh(MeshConfig(dp=2, sp=4))
    tokens = np.arange(4 * 8).reshape(4, 8)
    placed = shard_batch(mesh, {"tokens": tokens})["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8), "batch size 3 of batch['tokens'] is not divisible by the mesh axis dp=2; pad it to 4"),
        (
            (4, 10),
            "sequence length 10 of batch['tokens'] is not divisible by the mesh axis sp=4; pad it to 12",
        ),
    ],
)
def test_indivisible_batches_name_the_leaf_and_the_padding(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shard_batch(make_mesh(MeshConfig(dp=2, sp=4)), {"tokens": np.zeros(shape)})


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
