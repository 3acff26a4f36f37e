"""How fast training runs and what of the machine it uses.

None of these figures is the same in two runs, so all their names begin with "performance/"
(`ring_rl.training.metrics.without_performance` leaves them out).

    performance/steps_per_second          optimizer steps
    performance/tokens_per_second         tokens of the global batch
    performance/model_flops_utilisation   see `StepWork`
    performance/input_wait                share of the time in which the loop waited for a batch
    performance/checkpoint_wait           share of the time in which a save held the loop up
    performance/device_memory_gib         most that one of this process's devices has held so far
    performance/process_memory_gib        resident memory of this process, where devices don't say (CPUs)
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import resource
import sys
import time
from collections.abc import Iterator

import jax

from ring_rl.kernels.hardware import VIRTUAL_CPU, hardware_for
from ring_rl.training.metrics import PERFORMANCE_PREFIX

__all__ = ["IntervalClock", "StepWork", "memory_in_use", "peak_flops_per_second"]

_GIB = 2**30
_STATUS = pathlib.Path("/proc/self/statm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one optimizer step amounts to, over all devices and microbatches together.

    Model FLOPs utilisation is the share of the machine's peak that goes into the model's own arithmetic:

        model_flops / (seconds a step * devices * peak_flops_per_second)

    Model FLOPs are those of the mathematics: 6 a matmul parameter and token, and the visible half of causal
    attention once. What a program computes again (rematerialisation) or for nothing (masked tiles, padding
    inside a tile) does not count, so the figure can be compared between programs.

    Attributes:
        tokens: of the global batch.
        model_flops: forward and backward.
        devices: that the step runs on.
        peak_flops_per_second: of one device, or None where it is unknown: no utilisation is reported then.
    """

    tokens: int
    model_flops: float
    devices: int
    peak_flops_per_second: float | None

    def __post_init__(self) -> None:
        for name in ("tokens", "model_flops", "devices", "peak_flops_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} of a step must be positive, got {value}")

    def model_flops_utilisation(self, seconds: float) -> float | None:
        """The formula above for a step that takes `seconds`; None where the peak is unknown."""
        if self.peak_flops_per_second is None:
            return None
        return self.model_flops / (seconds * self.devices * self.peak_flops_per_second)


def peak_flops_per_second(device: jax.Device, *, configured: float | None) -> float | None:
    """The configured peak, or that of the device's data sheet (bf16, dense); None where there is none, as on CPUs."""
    if configured is not None:
        return configured
    hardware = hardware_for(device.device_kind)
    return None if hardware is VIRTUAL_CPU else hardware.flops_per_second


class IntervalClock:
    """Times the steps between two records of the metrics.

    Args:
        work: None reports steps only.
    """

    def __init__(self, work: StepWork | None):
        self._work = work
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin an interval after `step` steps."""
        self._step, self._start = step, time.perf_counter()
        self._waits = {"input_wait": 0.0, "checkpoint_wait": 0.0}

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """The time inside counts as waiting for a batch."""
        with self._counted("input_wait"):
            yield

    @contextlib.contextmanager
    def waiting_for_checkpoint(self) -> Iterator[None]:
        """The time inside counts as held up by a save."""
        with self._counted("checkpoint_wait"):
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count at all: evaluation, writing out a profile."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def metrics(self, step: int) -> dict[str, float]:
        """The figures of the interval that ends after `step` steps, for the docstring of this module; empty
        where the interval holds no step."""
        steps, seconds = step - self._step, time.perf_counter() - self._start
        if steps < 1:
            return {}
        figures = {"steps_per_second": steps / seconds}
        if self._work is not None:
            figures["tokens_per_second"] = self._work.tokens * steps / seconds
            utilisation = self._work.model_flops_utilisation(seconds / steps)
            if utilisation is not None:
                figures["model_flops_utilisation"] = utilisation
        figures |= {name: waited / seconds for name, waited in self._waits.items()}
        figures |= memory_in_use()
        return {PERFORMANCE_PREFIX + name: value for name, value in figures.items()}

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._waits[name] += time.perf_counter() - begin


def memory_in_use() -> dict[str, float]:
    """`device_memory_gib`: the most that one of this process's devices has held; on a CPU `process_memory_gib`."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return {"device_memory_gib": max(known) / _GIB}
    return {"process_memory_gib": _resident_bytes() / _GIB}


def _resident_bytes() -> int:
    if _STATUS.exists():
        return int(_STATUS.read_text().split()[1]) * resource.getpagesize()
    # Elsewhere only the peak is to be had, in KiB, on macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
