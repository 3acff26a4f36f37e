"""Commands that are waited for, also through Ctrl-C."""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["run_script", "run_to_its_end"]


def run_script(repository: pathlib.Path, script: str, *arguments: str) -> None:
    """Runs a Python script of a repository, here and shown to the user; what fails can be gone on with.

    Raises:
        ChildProcessError: it ended with another exit code than 0.
        KeyboardInterrupt: as `run_to_its_end`.
    """
    print(f"\n$ python {shlex.join((script, *arguments))}", flush=True)
    if exit_code := run_to_its_end([sys.executable, str(repository / script), *arguments]):
        raise ChildProcessError(f"{script} ended with exit code {exit_code}; the same command again goes on from here")


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
