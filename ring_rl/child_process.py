"""Commands that are waited for, also through Ctrl-C."""

from __future__ import annotations

import pathlib
import subprocess
from collections.abc import Sequence

__all__ = ["run_to_its_end"]


def run_to_its_end(command: Sequence[str], *, folder: pathlib.Path | None = None) -> int:
    """Runs a command in this terminal and returns its exit code.

    A terminal's Ctrl-C reaches the command as well: it is given the time to save what it has, where `subprocess.run`
    would kill it a quarter of a second later. A second one reaches it again.

    Args:
        command: the program and its arguments.
        folder: where it runs; None: here.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C; the command has ended by now.
    """
    process = subprocess.Popen(command, cwd=folder)
    interrupted = False
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt("the same command again goes on from here")
    return process.returncode
