"""Several processes on one machine: what the launcher does, and that two of 4 devices train as one of 8 does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ring_rl.training.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
LONGER = ["loop.steps=20", "loop.checkpoint_every=4", "distributed.heartbeat_timeout_seconds=5"]


def launch(*arguments):
    """The launcher, started; every process has 4 devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    return subprocess.Popen(
        [sys.executable, "experiments/launch.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(run_dir):
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def children_of(process):
    """Process ids in the order of their start."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return sorted(pid for pid, parent in pairs if parent == process.pid)


@pytest.fixture(scope="module")
def whole_run(train, tmp_path_factory):
    """A run of one process that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(run_dir, *LONGER)
    return run_dir


def test_two_processes_of_4_devices_train_as_one_of_8(whole_run, train_options, tmp_path):
    processes = launch("--processes", 2, "--", "experiments/train_agent.py", *train_options(tmp_path / "run"), *LONGER)
    output, errors = processes.communicate()
    assert processes.returncode == 0, errors
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole_run), rtol=1e-4)
    # Printed, logged and drawn once, by the first one.
    assert "[0] agentic_transformer on cartpole_swingup: mesh dp=1 x fsdp=1 x tp=1 x sp=8 over 8 cpu" in output
    # Gloo's threads of all processes write over one another, so only our own words tell.
    second = [line for line in output.splitlines() if line.startswith("[1]")]
    assert not [line for line in second if any(ours in line for ours in ("agentic_transformer", "loss", "seconds="))]
    assert len(losses(tmp_path / "run")) == 20


def test_one_of_two_is_killed_and_the_run_goes_on_with_one_process(whole_run, train, train_options, tmp_path):
    run_dir = tmp_path / "run"
    processes = launch("--processes", 2, "--", "experiments/train_agent.py", *train_options(run_dir), *LONGER)
    while not (run_dir / "checkpoints" / "4").exists():
        assert processes.poll() is None, processes.communicate()[1]
        time.sleep(0.02)
    os.kill(children_of(processes)[1], signal.SIGKILL)
    _, errors = processes.communicate()
    assert processes.returncode == 128 + signal.SIGKILL
    assert "[0] error: process 1 is lost, it was silent for 5 s" in errors
    assert "error: exit codes are process 0: 1, process 1: -9" in errors
    reached = len(losses(run_dir))
    train(run_dir, *LONGER)
    assert 4 <= reached < 20
    np.testing.assert_allclose(losses(run_dir), losses(whole_run), rtol=1e-4)


def test_a_wrong_setting_ends_all_processes_with_the_same_line(train_options, tmp_path):
    options = train_options(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    processes = launch("--processes", 2, "--", "experiments/train_agent.py", *options)
    _, errors = processes.communicate()
    assert processes.returncode == 1
    complaints = [line for line in errors.splitlines() if "holds no run (it has thesis.tex" in line]
    assert {line[:3] for line in complaints} == {"[0]", "[1]"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.fixture
def script(tmp_path):
    """A script that prints what it was given and then does as told."""
    path = tmp_path / "script.py"
    path.write_text(
        "import os, signal, sys, time\n"
        "given = dict(word.split('=', 1) for word in sys.argv[1:])\n"
        "number = given['distributed.process_id']\n"
        "print(sorted(given.items()), os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
        "if given['what'] == 'fail' and number == '1': sys.exit(3)\n"
        "if given['what'] == 'wait':\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        "    print('ready')\n"
        "if given['what'] != 'end': time.sleep(60)\n"
    )
    return path


def test_every_process_is_told_where_it_stands(script):
    launched = launch("--processes", 3, "--devices", "0,1", "2,3", "4,5", "--", script, "what=end")
    output, errors = launched.communicate()
    assert launched.returncode == 0, errors
    lines = sorted(output.splitlines())
    assert len(lines) == 3
    addresses = set()
    for number, line in enumerate(lines):
        assert line.startswith(f"[{number}] ")
        assert line.endswith(f" {2 * number},{2 * number + 1}")
        given = dict(eval(line[4 : line.rindex("]") + 1]))
        addresses.add(given.pop("distributed.coordinator_address"))
        assert given == {
            "what": "end",
            "distributed.mode": "explicit",
            "distributed.process_count": "3",
            "distributed.process_id": str(number),
        }
    assert len(addresses) == 1


def test_one_that_fails_takes_the_others_with_it(script, monkeypatch):
    launched = launch("--last-words", 0.5, "--processes", 2, "--", script, "what=fail")
    _, errors = launched.communicate()
    assert launched.returncode == 3
    assert "error: exit codes are process 0: -9, process 1: 3" in errors


def test_signals_reach_all(script):
    launched = launch("--processes", 2, "--", script, "what=wait")
    seen = ""
    while seen.count("ready") < 2:
        seen += launched.stdout.readline()
    launched.send_signal(signal.SIGTERM)
    launched.communicate()
    assert launched.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--processes", "0", "--", "experiments/train_agent.py"], "--processes must be at least 1, got 0"),
        (["--processes", "2", "--devices", "0", "--", "experiments/train_agent.py"], "names 1 groups for 2 processes"),
        (["--processes", "2", "--", "experiments/train_agnt.py"], "there is no script experiments/train_agnt.py"),
    ],
)
def test_wrong_options_are_refused(arguments, complaint):
    launched = launch(*arguments)
    _, errors = launched.communicate()
    assert launched.returncode == 2
    assert complaint in errors.splitlines()[-1]
