"""Where a number came from: the commit, the device and the versions that made it."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax


def git_commit() -> str | None:
    """The commit of the source this runs from, if it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_description() -> str:
    """The devices that JAX computes on, and the machine's processor: "8 x cpu (x86_64, AMD EPYC)"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({platform.machine()}, {_processor()})"


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages, and Python's."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
