"""Several processes that train one model: how they find each other, agree, and notice a loss.

JAX's own runtime joins the processes: process 0 also runs a coordination service, a small key-value store that every
process reaches without its devices. A thread in each process (`ring_rl.training.process_watch`) beats there once a
second and reads what the others say. So a process that is stuck in a collective, because another one died, ends with
one line instead of hanging.

    a process raises                 it says so; the others end within seconds
    a process dies without a word    it stops beating; the others end after `heartbeat_timeout_seconds`
    process 0 dies                   JAX's runtime ends the others at once, with a message of its own

Where there is one process only, everything here does nothing and costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from ring_rl.training.interrupt import TrainingInterrupted
from ring_rl.training.process_watch import PATIENCE_MILLISECONDS, ProcessWatch, exit_at_once

__all__ = ["DistributedConfig", "agree_to_stop", "barrier", "is_main_process", "joined", "on_main_process"]

# JAX's own limit is a backstop behind ours, which says more. It goes by the clock and aborts the process, whereas ours
# counts rounds, which last longer on a busy machine: so it must be far behind.
_BACKSTOP_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How processes find each other.

    Attributes:
        mode: "none": this is the only process. "auto": JAX recognises SLURM, Kubernetes, a TPU pod or Open MPI.
            "explicit": the next three say it.
        coordinator_address: "host:port" of process 0; null unless explicit.
        process_count: processes in all; null unless explicit.
        process_id: number of this one, from 0; null unless explicit.
        local_devices: "all" that the process sees, or the "one" that its rank on the machine names, where a cluster
            starts one process a GPU and hides none from it.
        heartbeat_timeout_seconds: silence after which a process counts as lost.
        initialization_timeout_seconds: how long processes wait for each other at the start.
    """

    mode: Literal["none", "auto", "explicit"]
    coordinator_address: str | None
    process_count: int | None
    process_id: int | None
    local_devices: Literal["all", "one"]
    heartbeat_timeout_seconds: int
    initialization_timeout_seconds: int

    def __post_init__(self) -> None:
        for name in ("heartbeat_timeout_seconds", "initialization_timeout_seconds"):
            if (seconds := getattr(self, name)) < 5:
                raise ValueError(f"{name} must be at least 5, got {seconds}")
        settings = {name: getattr(self, name) for name in ("coordinator_address", "process_count", "process_id")}
        if self.mode != "explicit":
            if given := [name for name, value in settings.items() if value is not None]:
                raise ValueError(f"{', '.join(given)} set with mode={self.mode}; set mode=explicit, or them to null")
            return
        if missing := [name for name, value in settings.items() if value is None]:
            raise ValueError(f"mode=explicit needs {', '.join(missing)}; set them, or mode=auto on a cluster")
        host, _, port = str(self.coordinator_address).rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"coordinator_address must be host:port, got {self.coordinator_address!r}")
        if not 0 <= (self.process_id or 0) < (self.process_count or 0):
            raise ValueError(
                f"process_id must lie between 0 and process_count - 1, got process_id={self.process_id} and "
                f"process_count={self.process_count}"
            )
        if self.local_devices == "one":
            raise ValueError("local_devices=one needs mode=auto, which knows the rank on the machine; set it to all")


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Join the other processes, before JAX touches a device; what ends one of them inside ends all.

    An exception that leaves the block is told to the other processes, which end with it. `TrainingInterrupted` is no
    failure: all processes raise it after the same step (`agree_to_stop`).

    Raises:
        ValueError: there is no cluster to recognise, or JAX has started its devices already.
        OSError: the processes did not meet in time.
    """
    global _watch
    if config.mode == "none":
        yield
        return
    _initialize(config)
    runtime = _runtime()
    if runtime.num_processes == 1:
        try:
            yield
        finally:
            jax.distributed.shutdown()
        return
    _watch = ProcessWatch(
        runtime.client, runtime.process_id, runtime.num_processes, timeout_seconds=config.heartbeat_timeout_seconds
    )
    _watch.start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, TrainingInterrupted):
            if _blames_another(error):
                # Who it was will be known soon, and the watch ends this process with that.
                time.sleep(config.heartbeat_timeout_seconds + _BACKSTOP_SECONDS)
            _watch.tell_failure(error)
            # The others are gone or going: at the exit JAX would wait for all of them to say goodbye.
            atexit.register(exit_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
            raise
        _leave()
        raise
    else:
        _leave()


def is_main_process() -> bool:
    """Whether this process prints, logs and draws."""
    return (jax.process_index() if _watch is None else _watch.process_id) == 0


def barrier(name: str) -> None:
    """Return once every process is here. All processes pass the same barriers in the same order."""
    if _watch is not None:
        _watch.client.wait_at_barrier(f"{_watch.turn('barrier', name)}", PATIENCE_MILLISECONDS)


def on_main_process(name: str, function: Callable[[], Any]) -> Any:
    """The plain JSON that `function` returns, called on the main process alone and given to all.

    Raises:
        ValueError, OSError: what `function` raised, on every process.
    """
    if _watch is None:
        return function()
    key = _watch.turn("said", name)
    if not is_main_process():
        said = json.loads(_watch.client.blocking_key_value_get(key, PATIENCE_MILLISECONDS))
        if "error" in said:
            raise {"OSError": OSError}.get(said["kind"], ValueError)(said["error"])
        return said["value"]
    try:
        value = function()
    except (ValueError, OSError) as error:
        kind = "OSError" if isinstance(error, OSError) else "ValueError"
        _watch.client.key_value_set(key, json.dumps({"error": str(error), "kind": kind}))
        raise
    _watch.client.key_value_set(key, json.dumps({"value": value}))
    return value


def agree_to_stop(done: int, requested: bool) -> bool:
    """Whether to stop after step `done`: True on every process after the same step, once any of them asks.

    Every process calls it after each step that it dispatched. It waits for nobody until someone asks. Then each
    process says which step it has entered, and all stop after the latest of these: none of them would finish a
    collective that the others never enter.

    Args:
        done: steps that this process has dispatched, the last one included.
        requested: it was asked to stop.
    """
    return requested if _watch is None else _watch.agree_to_stop(done, requested)


_watch: ProcessWatch | None = None


def _initialize(config: DistributedConfig) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    before = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.process_count,
            config.process_id,
            # An empty list keeps all devices; None lets a cluster's rank choose one.
            local_device_ids=[] if config.local_devices == "all" else None,
            cluster_detection_method="deactivate" if config.mode == "explicit" else None,
            initialization_timeout=config.initialization_timeout_seconds,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds + _BACKSTOP_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"no SLURM, Kubernetes, TPU pod or Open MPI is recognised here ({error}); "
            f"set distributed.mode=explicit and its three settings, or distributed.mode=none"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise OSError(
            f"the processes did not meet within {config.initialization_timeout_seconds} s "
            f"({str(error).splitlines()[0]}); see that all of them run and can reach "
            f"{config.coordinator_address or 'process 0'}"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"the processes cannot be joined ({str(error).splitlines()[0]})") from error
    if threading.current_thread() is threading.main_thread():
        # JAX's runtime takes SIGTERM for itself, and it would no longer end a process outside the training loop.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _blames_another(error: BaseException) -> bool:
    """Whether a collective failed, as it does where another process is gone: "Connection closed by peer"."""
    return isinstance(error, (RuntimeError, ValueError)) and bool(re.search(r"gloo|nccl|peer|socket", str(error), re.I))


def _leave() -> None:
    """Part in an orderly way: after this no process minds that another one is gone."""
    global _watch
    barrier("leave")
    if _watch is not None:
        _watch.close()
        _watch = None
    jax.distributed.shutdown()


def _runtime() -> Any:
    """JAX's own record of the processes."""
    # It has no public name, but Orbax takes it from here too. jax.process_index() would start the devices, and their
    # number could not be chosen any more.
    from jax._src import distributed

    return distributed.global_state
