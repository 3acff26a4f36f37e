"""Where a number came from: the commit, the device and the versions that made it."""

import contextlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_STARTS = "starts.jsonl"
# What a result depends on; results and pages lie beside it and change when results are made.
_SOURCE = ("ring_rl", "conf", "experiments/*.py", "datasets/*.py")


def git_commit() -> str | None:
    """The commit of the source this runs from, if it is a checkout; "+changes" after it if the source is another."""
    repository = Path(__file__).parents[2]
    try:
        commit = _git(repository, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(repository, "status", "--porcelain", "--", *_SOURCE) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_description() -> str:
    """The devices that JAX computes on, and the machine's processor: "8 x cpu (x86_64, AMD EPYC)"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({platform.machine()}, {_processor()})"


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages, and Python's."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def record_start(folder: Path, step: int) -> None:
    """Append to a run's `starts.jsonl` from which step, commit, devices and versions it goes on."""
    start = {
        "step": step,
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "flax", "optax"),
    }
    file = folder / _STARTS
    # A line that a crash tore must not swallow this one.
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a") as stream:
        stream.write("\n" * torn + json.dumps(start) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What `record_start` wrote, in order; empty where a run recorded nothing. Torn lines are left out."""
    file = folder / _STARTS
    if not file.exists():
        return []
    starts = []
    for line in file.read_text(errors="replace").splitlines():
        # The next start stands behind a torn line, so it may be any of them.
        with contextlib.suppress(json.JSONDecodeError):
            starts.append(json.loads(line))
    return starts
