"""A run that was killed and resumed must not differ from one that was not."""

from __future__ import annotations

import pathlib
import runpy
import signal
import sys

TOY_RUN = pathlib.Path(__file__).with_name("toy_run.py")
CHECK_RESUME = pathlib.Path(__file__).parents[2] / "experiments" / "check_resume.py"
STEPS = 40


def test_resumed_after_sigkill_and_after_sigterm_equals_uninterrupted(tmp_path):
    """Killed anywhere, asked to stop, killed while it saves: three resumes, to the bit."""
    runpy.run_path(str(TOY_RUN))["run"](tmp_path / "whole", steps=STEPS)
    kill_and_resume = runpy.run_path(str(CHECK_RESUME))["kill_and_resume"]
    resumes = kill_and_resume(
        lambda run: [sys.executable, str(TOY_RUN), str(run), str(STEPS), "0.03"],
        tmp_path / "interrupted",
        whole=tmp_path / "whole",
        signals=[signal.SIGKILL, signal.SIGTERM, signal.SIGKILL],
        seed=0,
    )
    assert resumes.final_equal
    assert resumes.equal == 3
    assert resumes.during_save >= 1
