"""Slices by name, and the devices that libtpu or the CPU backend gives for them."""

import importlib.util

import pytest

from ring_rl.planning import topology
from ring_rl.planning.topology import (
    TPU_SLICES,
    describe_topology,
    devices_of,
    machine_named,
    smallest_slice,
    tpu_slice,
)

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (700 MB, extra tpu-compile) is not installed"
)


@pytest.mark.parametrize(
    ("name", "chips", "devices", "grid"),
    [
        ("v4-1024", 512, 512, "v4:8x8x8"),
        ("v5p-8", 4, 4, "v5p:2x2x1"),
        ("v5e-256", 256, 256, "v5e:16x16"),
        ("v5litepod-8", 8, 8, "v5e:2x4"),
        ("V6E-1", 1, 1, "v6e:1x1"),
        ("v3-512", 256, 512, "v3:16x16"),
    ],
)
def test_names_count_what_google_counts(name, chips, devices, grid):
    found = tpu_slice(name)
    assert (found.chips, found.devices, found.topology) == (chips, devices, grid)
    assert found.megacore == name.startswith("v4")
    assert not found.estimated


def test_every_slice_is_found_by_its_name_and_has_memory_near_its_data_sheet():
    sheets = {"v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
    for name, found in TPU_SLICES.items():
        assert tpu_slice(name) is found
        assert found.memory_bytes == pytest.approx(sheets[found.generation] * 2**30, rel=0.05)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e-24", r"slices of v5e \(counted in chips\): v5e-1, v5e-4, .* v5e-256$"),
        ("v4-4", r"slices of v4 \(counted in TensorCores, two a chip\): v4-8, "),
        ("v7-8", "did you mean"),
        ("gpu:8", "such as gpu:8xA100-80GB"),
        ("gpu:0xA100-80GB", "such as gpu:8xA100-80GB"),
    ],
)
def test_an_unknown_machine_is_answered_with_the_known_ones(name, says):
    with pytest.raises(ValueError, match=says):
        machine_named(name)


def test_gpu_nodes_are_estimates_by_the_memory_in_their_name():
    node = machine_named("gpu:32xA100-80GB")
    assert (node.devices, node.memory_bytes, node.generation, node.estimated) == (32, 80 * 10**9, "A100", True)


@pytest.mark.parametrize(("devices", "name"), [(1, "v5e-1"), (5, "v5e-8"), (256, "v5e-256"), (257, None)])
def test_the_smallest_slice_has_enough_devices_and_none_smaller_does(devices, name):
    found = smallest_slice("v5e", devices=devices)
    assert (found and found.name) == name


def test_gpus_are_stood_in_for_by_cpu_devices():
    devices = devices_of(machine_named("gpu:4xA100-80GB"))
    assert [device.platform for device in devices] == ["cpu"] * 4
    with pytest.raises(ValueError, match="64"):
        devices_of(machine_named("gpu:64xA100-80GB"))


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tpu-compile"):
        devices_of(tpu_slice("v5e-8"))


@NEEDS_LIBTPU
@pytest.mark.parametrize("name", ["v3-8", "v4-8", "v5e-1", "v5e-8", "v5p-16", "v6e-4"])
def test_libtpu_gives_as_many_devices_as_the_slice_says(name):
    assert len(devices_of(tpu_slice(name))) == tpu_slice(name).devices


@NEEDS_LIBTPU
def test_a_grid_that_libtpu_does_not_know_is_one_line():
    with pytest.raises(ValueError, match="libtpu cannot describe topology 'v5e:3x7'"):
        describe_topology("v5e:3x7")
