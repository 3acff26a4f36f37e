"""A trace of a few training steps, for TensorBoard's profiler or Perfetto, and a short summary of it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import jax

from ring_rl.atomic_file import write_whole

__all__ = ["ProfileConfig", "StepProfiler", "summarise_trace"]

_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Whether and which steps to trace.

    Attributes:
        enabled: whether.
        start_step: optimizer steps taken before the trace begins; past the first step nothing compiles any more.
        steps: how many steps it holds.
    """

    enabled: bool
    start_step: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("start_step", "steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} of a profile must be at least 1, got {value}")


class StepProfiler:
    """Traces the configured steps; a context manager that ends an open trace however it is left.

    A run that goes on from a step within the range, or past it, traces nothing.

    Args:
        config: None traces nothing.
        folder: every trace gets a folder of its own in `<folder>/plugins/profile/`, named by the time.
    """

    def __init__(self, config: ProfileConfig | None, folder: pathlib.Path):
        self._config = config
        self._folder = pathlib.Path(folder).absolute()
        self._tracing = False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._tracing = False
            # What led here is the error to show.
            with contextlib.suppress(Exception):
                jax.profiler.stop_trace()

    def ends_after(self, done: int) -> bool:
        """Whether `stop` is due after `done` steps."""
        return self._tracing and self._config is not None and done == self._config.start_step + self._config.steps

    def step(self, step: int, earlier: Any) -> contextlib.AbstractContextManager[Any]:
        """Enter it around step `step`, counted from 0; a trace that begins here waits for `earlier` results."""
        if self._config is not None and step == self._config.start_step:
            jax.block_until_ready(earlier)
            options = jax.profiler.ProfileOptions()
            # Python's own calls would fill the trace and slow down what it measures.
            options.python_tracer_level = 0
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._tracing else contextlib.nullcontext()

    def stop(self, results: Any) -> pathlib.Path:
        """End the trace once `results` are there, write `summary.json` beside it and return that file."""
        jax.block_until_ready(results)
        jax.profiler.stop_trace()
        self._tracing = False
        trace = max(self._folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
        summary = trace.with_name("summary.json")
        write_whole(summary, json.dumps(summarise_trace(trace), indent=2) + "\n")
        return summary


def summarise_trace(trace: pathlib.Path) -> dict[str, Any]:
    """What the operations of a trace cost, the costliest first.

    Returns:
        `steps` traced, `operation_seconds` of all operations of all devices, and `operations`: name, count,
        seconds and share. An operation's seconds leave out those of operations inside it (a loop's body).
    """
    seconds: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    steps = set()
    for plane in _read(trace).planes:
        for line in plane.lines:
            operations = []
            for event in line.events:
                stats = {name: value for name, value in event.stats if name in ("hlo_op", "step_num")}
                if event.name == "train" and "step_num" in stats:
                    steps.add(stats["step_num"])
                # TPUs put operations on a line of their own, CPUs and GPUs mark them.
                if "hlo_op" in stats or line.name == "XLA Ops":
                    operations.append((event.start_ns, event.duration_ns, str(stats.get("hlo_op", event.name))))
            for name, own_ns in _own_durations(operations):
                seconds[name] += own_ns / 1e9  # type: ignore[assignment], a Counter of floats
                counts[name] += 1
    total = sum(seconds.values())
    return {
        "steps": len(steps),
        "operation_seconds": total,
        "operations": [
            {"name": name, "count": counts[name], "seconds": spent, "share": spent / total if total else 0.0}
            for name, spent in seconds.most_common(_SHOWN)
        ],
    }


def _read(trace: pathlib.Path) -> jax.profiler.ProfileData:
    data = jax.profiler.ProfileData.from_file(str(trace))
    # jaxlib 0.12 makes its types at their first use, with a warning that aborts the process where warnings are errors.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    list(event.stats)
                    return data
    return data


def _own_durations(operations: Iterable[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """Each operation's time without that of the operations nested in it, all of them on one line of a trace."""
    own: list[list[Any]] = []
    enclosing: list[tuple[float, int]] = []
    for start, duration, name in sorted(operations, key=lambda operation: (operation[0], -operation[1])):
        while enclosing and enclosing[-1][0] <= start:
            enclosing.pop()
        if enclosing:
            own[enclosing[-1][1]][1] -= duration
        enclosing.append((start + duration, len(own)))
        own.append([name, duration])
    return [(name, duration) for name, duration in own]
