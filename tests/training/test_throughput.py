from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from ring_rl.kernels.hardware import HARDWARE
from ring_rl.training.throughput import IntervalClock, StepWork, memory_in_use, peak_flops_per_second


def test_utilisation_is_the_share_of_the_peak_that_goes_into_the_model():
    # 8 devices of 100 TFLOP/s for 2 s could do 1600 TFLOP.
    work = StepWork(tokens=1, model_flops=640e12, devices=8, peak_flops_per_second=100e12)
    assert work.model_flops_utilisation(2.0) == pytest.approx(0.4)
    unknown = StepWork(tokens=1, model_flops=640e12, devices=8, peak_flops_per_second=None)
    assert unknown.model_flops_utilisation(2.0) is None


@pytest.mark.parametrize("name", ["tokens", "model_flops", "devices", "peak_flops_per_second"])
def test_work_must_be_positive(name):
    values = {"tokens": 1, "model_flops": 1.0, "devices": 1, "peak_flops_per_second": 1.0, name: 0}
    with pytest.raises(ValueError, match=f"{name} of a step must be positive, got 0"):
        StepWork(**values)


def test_the_peak_is_configured_or_known_or_absent():
    h100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert peak_flops_per_second(h100, configured=None) == HARDWARE["H100 NVLink"].flops_per_second
    assert peak_flops_per_second(h100, configured=5e14) == 5e14
    assert peak_flops_per_second(jax.devices("cpu")[0], configured=None) is None
    assert peak_flops_per_second(jax.devices("cpu")[0], configured=1e11) == 1e11


def test_an_interval_without_a_step_has_no_rates():
    clock = IntervalClock(None)
    clock.restart(5)
    assert clock.metrics(5) == {}
    assert clock.metrics(6)["performance/steps_per_second"] > 0
    assert "performance/tokens_per_second" not in clock.metrics(6)


def test_memory_is_the_fullest_device_or_else_the_process(monkeypatch):
    assert 0.01 < memory_in_use()["process_memory_gib"] < 1000
    devices = [SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak}) for peak in (2**30, 2**31)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_in_use() == {"device_memory_gib": 2.0}
