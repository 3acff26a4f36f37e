"""A thread in each of several processes that notices when one of them fails, dies or is asked to stop.

It talks through the key-value store of JAX's coordination service, which lives in process 0:

    ring_rl/beat/<process>      a number that grows once a second; process 0 reads all of them
    ring_rl/failure             why all must end
    ring_rl/stop                set when one was asked to stop
    ring_rl/entered/<process>   the step that it has entered, said once there is a request to stop
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any

import jax

__all__ = ["PATIENCE_MILLISECONDS", "ProcessWatch", "exit_at_once"]

# Longer than any wait that is not an error; a lost process ends it earlier.
PATIENCE_MILLISECONDS = 24 * 3600 * 1000


class ProcessWatch(threading.Thread):
    """Beats, reads the beats of the others (process 0 does, for all), and answers a request to stop.

    Args:
        client: of the coordination service.
        process_id: number of this process.
        process_count: processes in all.
        timeout_seconds: silence after which a process is lost.
    """

    def __init__(self, client: Any, process_id: int, process_count: int, *, timeout_seconds: float):
        super().__init__(name="process-watch", daemon=True)
        self.client = client
        self.process_id = process_id
        self._count, self._timeout = process_count, timeout_seconds
        self._period = min(1.0, timeout_seconds / 10)
        self._beats: dict[str, tuple[str, int]] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._turns: dict[str, int] = {}
        self._entered = 0
        self._answered = False
        self._asked = False
        self._stop_after: int | None = None

    def run(self) -> None:
        """Once a second until `close`."""
        number = 0
        while not self._over.wait(self._period):
            number += 1
            try:
                self.client.key_value_set(f"ring_rl/beat/{self.process_id}", str(number), allow_overwrite=True)
                failure = self._read("ring_rl/failure")
                if failure is None and self.process_id == 0 and (failure := self._silent()) is not None:
                    self.client.key_value_set("ring_rl/failure", failure)
                    # This process holds the store that the others must read it from.
                    time.sleep(3.0)
                if self._read("ring_rl/stop") is not None:
                    self._answer()
            except Exception:
                # The store is gone, and process 0 with it: JAX's runtime ends this process, or it is ending anyway.
                continue
            if failure is not None and not self._over.is_set():
                _print_error(failure)
                exit_at_once(1)

    def turn(self, kind: str, name: str) -> str:
        """A key that is new at each call and the same on every process."""
        self._turns[name] = self._turns.get(name, 0) + 1
        return f"ring_rl/{kind}/{name}/{self._turns[name]}"

    def tell_failure(self, error: BaseException) -> None:
        """Let the others end; whoever speaks first is heard."""
        self._over.set()
        reason = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(Exception):
            self.client.key_value_set("ring_rl/failure", f"process {self.process_id} failed: {reason}")
            if self.process_id == 0:
                time.sleep(3.0)

    def agree_to_stop(self, done: int, requested: bool) -> bool:
        """See `ring_rl.training.distributed.agree_to_stop`."""
        if requested and not self._asked:
            self._asked = True
            self.client.key_value_set("ring_rl/stop", "asked", allow_overwrite=True)
            self._answer()
        with self._lock:
            if not self._answered:
                self._entered = done + 1
                return False
        if self._stop_after is None:
            keys = [f"ring_rl/entered/{process}" for process in range(self._count)]
            self._stop_after = max(int(self.client.blocking_key_value_get(key, PATIENCE_MILLISECONDS)) for key in keys)
        return done >= self._stop_after

    def close(self) -> None:
        """Stop watching: the processes are about to part."""
        self._over.set()
        self.join()

    def _answer(self) -> None:
        # From this thread, because the main one may be waiting for a step that another process has yet to enter.
        with self._lock:
            if self._answered:
                return
            self._answered = True
        self.client.key_value_set(f"ring_rl/entered/{self.process_id}", str(self._entered))

    def _silent(self) -> str | None:
        """A complaint about a process that has not beaten for too long."""
        found = dict(self.client.key_value_dir_get("ring_rl/beat/"))
        for process in range(self._count):
            key = f"ring_rl/beat/{process}"
            last, missed = self._beats.get(key, ("", 0))
            newest = found.get(key, "")
            # Counted in our own rounds, not by the clock: a machine that was suspended has lost nobody.
            missed = missed + 1 if newest == last else 0
            self._beats[key] = (newest, missed)
            if missed * self._period > self._timeout:
                return (
                    f"process {process} is lost, it was silent for {self._timeout:g} s; "
                    f"start again to resume from the last checkpoint"
                )
        return None

    def _read(self, key: str) -> str | None:
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise


def _print_error(message: str) -> None:
    # Unbuffered and in one piece: other threads may be printing.
    os.write(2, f"error: {message}\n".encode())


def exit_at_once(code: int) -> None:
    """End the process without the farewell that JAX would wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
