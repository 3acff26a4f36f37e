"""A full disk, told once: recognising it, and silencing the echoes of a writer made of many threads."""

from __future__ import annotations

import errno
import logging
import sys
from typing import Any

__all__ = ["EchoSilencer", "means_no_space"]

_LOGGERS = ("absl", "asyncio")


def means_no_space(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, is that of a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # The array writer is not Python's: it passes on the system's words only.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class EchoSilencer:
    """From `start` on, drops what Orbax's threads print beside the one error that they raise.

    On a full disk each of them logs its own traceback, and writes that end after the failed save report to an
    event loop that is closed by then. Everything else is passed on. `stop` gives the interpreter's hook back;
    the log filter stays, because asyncio logs its share only when the garbage is collected.
    """

    def __init__(self) -> None:
        self._previous_hook: Any = None

    def start(self) -> None:
        """Begin to drop them."""
        for logger in _LOGGERS:
            logging.getLogger(logger).addFilter(_is_not_about_space)
        self._previous_hook = sys.unraisablehook
        sys.unraisablehook = self._pass_on

    def stop(self) -> None:
        """Restore the hook, unless another one was set above this one meanwhile."""
        if sys.unraisablehook == self._pass_on:
            sys.unraisablehook = self._previous_hook

    def _pass_on(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            return
        self._previous_hook(unraisable)


def _is_not_about_space(record: logging.LogRecord) -> bool:
    return not (record.exc_info and means_no_space(record.exc_info[1]))
