"""The progress bar of a training."""

from __future__ import annotations

import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """Steps done, time left, loss and steps per second; lines printed on the same console stay above it.

    Args:
        start: steps done already.
        total: steps in all.
        visible: False shows nothing.
        console: rich's global one when None.
    """

    def __init__(self, start: int, total: int, *, visible: bool, console: Console | None = None):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console or rich.get_console(),
            disable=not visible,
        )
        self._start = start
        self._task = self._progress.add_task("compiling", total=total, completed=start, figures="")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, done: int) -> None:
        """Show that `done` steps are done."""
        if done == self._start + 1:
            # The estimate of the time left must not count the compilation.
            self._progress.reset(self._task, completed=done, description="training")
        else:
            self._progress.update(self._task, completed=done)

    def report(self, *, loss: float, steps_per_second: float | None) -> None:
        """Show the newest figures; None where no whole interval has been timed yet."""
        speed = "" if steps_per_second is None else f", {steps_per_second:.3g} steps/s"
        self._progress.update(self._task, figures=f"loss {loss:.4g}{speed}")
