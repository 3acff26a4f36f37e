"""The check itself runs in tests/training/test_resume.py, on a training that starts faster."""

import json
import runpy
import signal
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def write_run(folder, losses):
    folder.mkdir(parents=True)
    records = [{"step": step, "loss": loss, "performance/steps_per_second": 1.0} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("kills=0", "kills must be at least 1, got 0"),
        ("signal=SIGHUP", "'signal' must be one of SIGKILL, SIGTERM"),
        ("command=[]", "command is empty; name an entry point"),
        ("command=[experiments/absent.py]", "ended with 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(call_script, refused, tmp_path, override, complaint):
    assert complaint in refused(call_script, "check_resume", f"folder={tmp_path / 'check'}", override)


def test_an_earlier_check_is_left_alone(call_script, refused, tmp_path):
    assert "exists; move it away" in refused(call_script, "check_resume", f"folder={tmp_path}")


def test_a_run_that_fails_is_told_from_one_that_was_killed(tmp_path):
    kill_and_resume = runpy.run_path(str(REPOSITORY / "experiments" / "check_resume.py"))["kill_and_resume"]
    write_run(tmp_path / "whole", [3.0, 2.0, 1.0])
    command = [sys.executable, "-c", "raise SystemExit('no data')"]
    with pytest.raises(ValueError, match="the run ended with 1 before it was killed: no data"):
        kill_and_resume(lambda _: command, tmp_path / "run", whole=tmp_path / "whole", signals=[signal.SIGKILL], seed=0)
