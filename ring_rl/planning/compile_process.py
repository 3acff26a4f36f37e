"""Compiling in processes of their own: a compiler that dies takes nothing along, and several work at once.

    with open_probe_cache(path) as cache, CompileProcesses() as processes:
        memory = remembered(request, machine, cache=cache, processes=processes)

`python -m ring_rl.planning.compile_process` is the other side. It reads a line of JSON, answers with one, and ends at
once when whoever asked does, however that ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ring_rl.config import from_mapping, to_mapping
from ring_rl.planning.compiled_step import CompiledMemory, StepRequest, compile_memory
from ring_rl.planning.probe_cache import CachedProbe, ProbeCache, probe_key
from ring_rl.planning.topology import Machine, TpuSlice, devices_of, machine_named
from ring_rl.training.provenance import git_commit

__all__ = ["CompilationFailedError", "CompileProcesses", "compiler_versions", "key_of", "remembered"]

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "ImportError": ImportError}


class CompilationFailedError(RuntimeError):
    """A compiler, or its process, ended without an answer."""


def key_of(request: StepRequest, machine: Machine) -> dict[str, Any]:
    """Of a probe: GPUs are stood in for by CPU devices, whatever they are called.

    Flags that the environment gives the compilers are part of it.
    """
    flags = {name: os.environ[name] for name in _FLAGS if name in os.environ}
    if isinstance(machine, TpuSlice):
        return probe_key(request, machine.topology, {**compiler_versions(), **flags})
    return probe_key(request, f"cpu x {machine.devices}", {**compiler_versions(tpu=False), **flags})


def remembered(
    request: StepRequest, machine: Machine, *, cache: ProbeCache, processes: CompileProcesses
) -> CompiledMemory:
    """What the compiler says, or said before.

    Raises:
        ValueError: The mesh, the model and the context do not fit together.
        ImportError: libtpu is not installed.
        CompilationFailedError: It ended otherwise.
    """
    key = key_of(request, machine)
    with cache.asking(key):
        known = cache.get(key)
        if known is not None:
            return known.memory
        memory = processes.compile(request, machine)
        cache.put(CachedProbe(key=key, memory=memory, commit=git_commit()))
        return memory


class CompileProcesses:
    """Starts a process for every compilation, in whichever thread asks, and ends those that run when it is left."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> CompileProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()

    @property
    def running(self) -> int:
        """Compilers at work."""
        return len(self._running)

    def compile(self, request: StepRequest, machine: Machine) -> CompiledMemory:
        """`compile_memory` for a machine, in a process of its own.

        Raises:
            ValueError: The mesh, the model and the context do not fit together.
            ImportError: libtpu is not installed.
            CompilationFailedError: It ended otherwise.
        """
        question = json.dumps({"request": to_mapping(request), "machine": machine.name}) + "\n"
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died; what it said tells why
                process.stdin.write(question)
                process.stdin.flush()
            # Both pipes are read at once: a compiler that says much must not wait for a reader.
            said = _Reader(process.stderr)
            answers = process.stdout.read()
            exit_code = process.wait()
            said.join()
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):
                    pipe.close()
            with self._lock:
                self._running.discard(process)
        return _read_answer(answers, exit_code, said.text)

    def _start(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._closed:
                raise CompilationFailedError("nothing is compiled any more: the search was ended")
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # A terminal's Ctrl-C is for whoever asked, who then ends this one.
                start_new_session=True,
            )
            self._running.add(process)
            return process


class _Reader(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, pipe: Any):
        super().__init__(daemon=True)
        self._pipe, self.text = pipe, ""
        self.start()

    def run(self) -> None:
        """Until whoever writes closes it."""
        self.text = self._pipe.read()


def _read_answer(answers: str, exit_code: int, said: str) -> CompiledMemory:
    lines = answers.strip().splitlines()
    if exit_code == 0 and lines:
        answer = json.loads(lines[-1])
        if "memory" in answer:
            return from_mapping(CompiledMemory, answer["memory"])
        raise _ERRORS[answer["error"]](answer["message"])
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    if exit_code == -9:
        last = "it was killed; if this machine ran out of memory, set processes=1"
    raise CompilationFailedError(f"a compiler ended with exit code {exit_code}: {last[:300]}")


@functools.cache
def compiler_versions(*, tpu: bool = True) -> Mapping[str, str]:
    """Of what compiles, as far as it is installed."""
    found = {}
    for package in ("jax", "jaxlib", *(("libtpu",) if tpu else ())):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _answer(question: str) -> dict[str, Any]:
    asked = json.loads(question)
    request = from_mapping(StepRequest, asked["request"])
    try:
        memory = compile_memory(request, devices_of(machine_named(asked["machine"])))
    except (ValueError, ImportError) as error:
        kind = next(name for name, cls in _ERRORS.items() if isinstance(error, cls))
        return {"error": kind, "message": str(error)}
    return {"memory": to_mapping(memory)}


def _end_with_whoever_asked() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Answers one question."""
    question = sys.stdin.readline()
    threading.Thread(target=_end_with_whoever_asked, daemon=True).start()
    print(json.dumps(_answer(question)), flush=True)
    # The thread that waits for an end of input holds its lock; nothing is left to tidy up.
    os._exit(0)


if __name__ == "__main__":
    main()
