"""What compilers said before, one JSON line a probe: nothing is compiled twice, and a killed search loses one probe.

A line is written when its probe is known, with everything that determines it (the request, the machine and the versions
of the compilers) as its key, and the commit beside it. The commit is no part of the key: after a change of the model's
code, which may change what it needs, begin a new file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ring_rl.config import from_mapping, to_mapping
from ring_rl.planning.compiled_step import CompiledMemory, StepRequest

__all__ = ["CachedProbe", "ProbeCache", "open_probe_cache", "probe_key", "read_probes"]


def probe_key(request: StepRequest, machine: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Everything that determines what a compiler says.

    Args:
        request: The step.
        machine: What it is compiled for: libtpu's name of a grid of chips, or "cpu x 8".
        versions: Of jax, jaxlib and, where it compiles, libtpu; and what else makes one compiler another.
    """
    return {"request": to_mapping(request), "machine": machine, "versions": dict(versions)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedProbe:
    """A line.

    Attributes:
        key: As `probe_key` makes it.
        memory: What the compiler said.
        commit: Of the code that asked; None where it was no checkout.
    """

    key: dict[str, Any]
    memory: CompiledMemory
    commit: str | None


class ProbeCache:
    """A file of probes, open for appending by one process at a time; threads of it may share it.

    Args:
        path: The file; it and its folder are made if they are missing.

    Use `open_probe_cache`, which takes the lock and gives it back.
    """

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._probes = {_canonical(probe.key): probe for probe in read_probes(path)}

    def get(self, key: Mapping[str, Any]) -> CachedProbe | None:
        """The probe of that key, if it is known."""
        with self._lock:
            return self._probes.get(_canonical(key))

    @contextlib.contextmanager
    def asking(self, key: Mapping[str, Any]) -> Iterator[None]:
        """One thread at a time asks for the same key: two cells may share steps, as GPUs of another memory do."""
        with self._lock:
            lock = self._asking.setdefault(_canonical(key), threading.Lock())
        with lock:
            yield

    def put(self, probe: CachedProbe) -> None:
        """Remembers a probe; when this returns it is on disk.

        Raises:
            OSError: It could not be written.
        """
        line = json.dumps({"key": probe.key, "memory": to_mapping(probe.memory), "commit": probe.commit})
        with self._lock:
            # A line that a kill tore must not swallow this one.
            torn = self._path.exists() and self._path.stat().st_size > 0 and not _ends_with_newline(self._path)
            with self._path.open("a") as file:
                file.write("\n" * torn + line + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._probes[_canonical(probe.key)] = probe

    def all(self) -> list[CachedProbe]:
        """Every probe, in the order in which they became known."""
        with self._lock:
            return list(self._probes.values())


@contextlib.contextmanager
def open_probe_cache(path: Path) -> Iterator[ProbeCache]:
    """The cache, locked against other processes until the block ends, or this process does, however it does.

    Raises:
        FileExistsError: Another process has it open.
        ValueError: The file holds something else.
        OSError: It cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another process is adding to {path}; wait for it, or choose another file of probes"
            ) from None
        if not _may_be_probes(path):
            raise ValueError(f"{path} is no file of probes, and nothing is added to it; choose another file of probes")
        yield ProbeCache(path)


def read_probes(path: Path) -> list[CachedProbe]:
    """All whole lines of a file; of equal keys the last counts. Empty where there is no file."""
    found: dict[str, CachedProbe] = {}
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            # A torn line, or one by another version of this code: its probe is asked again.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                memory = from_mapping(CompiledMemory, record["memory"])
                found[_canonical(record["key"])] = CachedProbe(
                    key=record["key"], memory=memory, commit=record["commit"]
                )
    return list(found.values())


def _may_be_probes(path: Path) -> bool:
    """Whether the file is missing, empty, or begins as a line of probes does, torn or whole."""
    begins = b'{"key"'
    if not path.exists():
        return True
    with path.open("rb") as file:
        found = file.read(len(begins)).lstrip()
    return found.startswith(begins) or begins.startswith(found)


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
