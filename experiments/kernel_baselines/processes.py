"""The processes that the kernel benchmark asks: one an implementation and number of devices."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

Platform = Literal["cpu", "gpu"]
# Each has a script beside this one, attend_<name>.py, and is the name of the package that it runs.
Implementation = Literal["ring_rl", "ringattention", "jax", "torch"]


class Worker:
    """A process that serves one implementation; see benchmark_worker.py."""

    def __init__(self, implementation: Implementation, *, devices: int, platform: Platform | None) -> None:
        """Starts it with that many virtual CPU devices and waits for its first line."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        script = Path(__file__).with_name(f"attend_{implementation}.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(devices, platform),
            # Ctrl-C is for this process, which then ends the others.
            start_new_session=True,
        )
        try:
            self.hello = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ValueError: The worker answered with an error, or died.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the reading end says why
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise ValueError(f"process ended with {self._process.returncode}: {said[-1] if said else 'no message'}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer


class Workers:
    """Processes by implementation and number of devices, started when they are first asked for."""

    def __init__(self, platform: Platform | None) -> None:
        """Starts the one that tells the platform and measures JAX's matrix product."""
        self._running: dict[tuple[Implementation, int], Worker] = {}
        self._failures: dict[tuple[Implementation, int], ValueError] = {}
        self._wanted: Platform | None = platform
        self.hello = self._start("jax", 1).hello
        found = self.hello["platform"]
        if found not in ("cpu", "gpu") or (platform or found) != found:
            self.close()
            raise ValueError(f"JAX runs on {found} here, not on {platform or 'cpu or gpu'}; set platform=cpu")
        self.platform: Platform = found
        self._wanted = self.platform

    def get(self, implementation: Implementation, devices: int) -> Worker:
        """The process that serves this.

        Raises:
            ValueError: The implementation is not installed, or cannot run on this platform.
        """
        key = (implementation, devices if self.platform == "cpu" else 1)
        if key in self._failures:
            raise self._failures[key]
        try:
            return self._running.get(key) or self._start(*key)
        except ValueError as error:
            self._failures[key] = error
            raise

    def versions(self) -> dict[str, str]:
        """Of everything that ran."""
        return {name: of for worker in self._running.values() for name, of in worker.hello["versions"].items()}

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._running.values():
            worker.close()

    def _start(self, implementation: Implementation, devices: int) -> Worker:
        if importlib.util.find_spec(implementation) is None:
            raise ValueError(f"{implementation} is not installed; pip install -e '.[benchmarks]' brings it")
        worker = Worker(implementation, devices=devices, platform=self._wanted)
        if self._running and worker.hello["platform"] != self.platform:
            worker.close()
            raise ValueError(f"{implementation} is installed for {worker.hello['platform']}, not for {self.platform}")
        self._running[implementation, devices] = worker
        return worker


def _environment(devices: int, platform: Platform | None) -> dict[str, str]:
    flag = "--xla_force_host_platform_device_count"
    flags = [word for word in os.environ.get("XLA_FLAGS", "").split() if not word.startswith(f"{flag}=")]
    # Several processes share a GPU: none may take all of its memory at the start.
    changes = {"XLA_FLAGS": " ".join([*flags, f"{flag}={devices}"]), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if platform == "cpu":
        changes |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **changes}
