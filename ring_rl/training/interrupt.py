"""Stopping on request: a first signal asks, a second one ends the process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest", "TrainingInterrupted"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped because it was asked to, after saving its state."""


class StopRequest:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending the process; a second one ends it.

    Outside the main thread it does nothing, because Python sets signal handlers in the main thread only.

    Attributes:
        requested: True once a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # A handler that was not set from Python reads as None and cannot be set from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        for later in _SIGNALS:
            # The system's own action, because a Python handler would have to wait for the step's native code.
            signal.signal(later, signal.SIG_DFL)
        message = b"\nstopping after this step and saving; once more to end at once\n"
        # Unbuffered: a handler may interrupt a write to the same stream. A progress bar hides the cursor, and
        # an end by the second signal would leave it hidden.
        os.write(2, message + (_SHOW_CURSOR if sys.stderr is not None and os.isatty(2) else b""))
