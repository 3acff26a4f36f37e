import dataclasses

import jax
import pytest

from ring_rl.kernels.hardware import HARDWARE, VIRTUAL_CPU, hardware_for


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 NVLink"),
        ("NVIDIA H100 80GB HBM3", "H100 NVLink"),
        ("NVIDIA H200", "H200 NVLink"),
        ("NVIDIA B200", "B200 NVLink"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X VF", "MI300X"),
        ("TPU v3", "TPU v3"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("cpu", "virtual CPU"),
        ("TPU v4 lite", "virtual CPU"),
        ("Tesla T4", "virtual CPU"),
    ],
)
def test_what_jax_reports_is_found(kind, name):
    assert hardware_for(kind) is HARDWARE[name]


def test_the_devices_of_this_test_run_have_free_transfers():
    assert hardware_for(jax.devices("cpu")[0].device_kind) is VIRTUAL_CPU


def test_a_torus_gives_one_neighbour_one_link():
    assert HARDWARE["TPU v5p"].neighbour_bytes_per_second == pytest.approx(100e9)
    assert HARDWARE["H100 NVLink"].neighbour_bytes_per_second == 450e9


def test_gpus_joined_each_to_each_give_one_neighbour_one_link():
    assert HARDWARE["MI300X"].neighbour_bytes_per_second == pytest.approx(64e9)


def test_every_entry_says_where_it_is_from():
    for name, hardware in HARDWARE.items():
        assert hardware.name == name
        assert hardware.source


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bytes_per_second": 0.0}, "bytes_per_second of TPU v4 must be positive"), ({"links": 0}, "at least 1 link")],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HARDWARE["TPU v4"], **change)
