from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ring_rl.training.interrupt import TrainingInterrupted
from ring_rl.training.metrics import (
    ConsoleWriter,
    JsonlWriter,
    WandbConfig,
    WandbWriter,
    read_metrics,
    without_performance,
)


def write_steps(path, steps, *, resume_step: int = 0) -> None:
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})
    writer.close()


def test_one_object_a_line_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=0)
    writer.write(1, {"loss": 0.5})
    # Before the writer is closed: a killed process loses nothing that it wrote.
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'
    writer.write(2, {"loss": float("nan"), "norm": float("inf")})
    writer.close()
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 2, "loss": None, "norm": None}
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


@given(written=st.integers(0, 12), resume_step=st.integers(0, 12), torn=st.integers(0, 20))
def test_after_resuming_no_step_stands_twice_and_nothing_is_lost(tmp_path_factory, written, resume_step, torn):
    resume_step = min(resume_step, written)
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write_steps(path, range(1, written + 1))
    tail = json.dumps({"step": written + 1, "loss": 0.123456789})[:torn]
    with path.open("a") as file:
        file.write(tail)
    before = path.read_text()
    write_steps(path, range(resume_step + 1, 15), resume_step=resume_step)
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 15))
    aside = path.with_name("metrics.superseded.jsonl")
    superseded = aside.read_text().splitlines() if aside.exists() else []
    assert superseded == before.splitlines()[resume_step:]


def test_a_second_resume_adds_to_what_was_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    write_steps(path, [2, 3, 4], resume_step=1)
    write_steps(path, [3], resume_step=2)
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded] == [2, 3, 3, 4]
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_torn_last_line_is_tolerated_and_a_torn_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"line 2 of {path} is no metrics record: '{{\"st'")):
        read_metrics(path)
    with pytest.raises(ValueError, match="line 2"):
        JsonlWriter(path, resume_step=1)
    with pytest.raises(FileNotFoundError, match="no metrics file"):
        read_metrics(tmp_path / "absent.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full, a file that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", resume_step=0)
    writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"metrics cannot be written: No space left on device: .*metrics\.jsonl"):
        writer.write(1, {"loss": 1.0})
    writer._file.close()


def test_a_disk_with_room_for_half_a_line_is_full(tmp_path):
    """The system then writes that half and reports no error; a later line behind it would damage the file."""
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=0)
    writer.write(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="metrics cannot be written: File too large"):
            writer.write(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    writer.close()
    write_steps(path, [2, 3], resume_step=1)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_console_prints_one_line_a_step():
    stream = io.StringIO()
    writer = ConsoleWriter(Console(file=stream, width=40))
    writer.write(7, {"loss": 0.123456789, "evaluation/return": 12.0, "[bold]": 1.0, "performance/input_wait": 0.25})
    writer.close()
    assert stream.getvalue() == "step       7  loss 0.12346  evaluation/return 12  [bold] 1  input_wait 0.25\n"


def test_what_the_machine_did_can_be_left_out():
    record = {"step": 1, "loss": 2.0, "performance/steps_per_second": 3.0, "evaluation/performance": 4.0}
    assert without_performance(record) == {"step": 1, "loss": 2.0, "evaluation/performance": 4.0}


def test_disabled_wandb_is_not_even_imported(tmp_path):
    source = (
        "import pathlib, sys; from ring_rl.training.metrics import WandbConfig, WandbWriter\n"
        "config = WandbConfig(mode='disabled', project='p', entity=None, name=None)\n"
        "writer = WandbWriter(config, folder=pathlib.Path(sys.argv[1]), run_config={})\n"
        "writer.write(1, {'loss': 1.0}); writer.close(); print('wandb' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", source, str(tmp_path)], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "False\n", "")
    assert list(tmp_path.iterdir()) == []


def test_offline_wandb_keeps_its_run_in_the_folder_and_is_silent(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    config = WandbConfig(mode="offline", project="p", entity=None, name="toy")
    ids = []
    for resume_step in (0, 2):
        writer = WandbWriter(config, folder=folder, run_config={"seed": 0})
        ids.append(writer._run.id)
        writer.write(resume_step + 1, {"loss": 1.0})
        writer.close()
    assert ids[0] == ids[1] == (folder / "wandb_run_id").read_text().strip()
    assert list((folder / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, [("finish", 0)]),
        (TrainingInterrupted("saved"), [("mark_preempting",), ("finish", 1)]),
        (ValueError("diverged"), [("finish", 1)]),
    ],
)
def test_wandb_is_told_how_the_run_ended(tmp_path, monkeypatch, error, told):
    """A sweep hands a run out again that was marked as preempting and did not finish with 0."""
    import wandb

    heard = []

    class Run:
        def mark_preempting(self):
            heard.append(("mark_preempting",))

        def finish(self, exit_code):
            heard.append(("finish", exit_code))

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    config = WandbConfig(mode="offline", project="p", entity=None, name=None)
    writer = WandbWriter(config, folder=tmp_path, run_config={})
    writer.close(error)
    writer.close(error)
    assert heard == told


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.Error("No API key configured.\nsecond line")

    monkeypatch.setattr(wandb, "init", refuse)
    config = WandbConfig(mode="online", project="p", entity=None, name=None)
    with pytest.raises(ValueError, match=r"cannot start \(No API key configured\.\); run `wandb login`, or"):
        WandbWriter(config, folder=tmp_path, run_config={})


def test_wandb_needs_a_project_unless_disabled():
    WandbConfig(mode="disabled", project="", entity=None, name=None)
    with pytest.raises(ValueError, match="wandb needs a project name"):
        WandbConfig(mode="offline", project="", entity=None, name=None)
