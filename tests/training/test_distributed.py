"""Two real processes, joined by JAX's runtime on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from ring_rl.training.distributed import (
    DistributedConfig,
    agree_to_stop,
    barrier,
    is_main_process,
    joined,
    on_main_process,
)

SETTINGS = {
    "mode": "none",
    "coordinator_address": None,
    "process_count": None,
    "process_id": None,
    "local_devices": "all",
    "heartbeat_timeout_seconds": 5,
    "initialization_timeout_seconds": 60,
}

# Each process is given its number, the port, and the body of the block.
BEGINNING = """
import os, pathlib, signal, sys, time
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ring_rl.config import exit_on_bad_input
from ring_rl.training.distributed import DistributedConfig, agree_to_stop, barrier, is_main_process, joined, \\
    on_main_process
from ring_rl.training.interrupt import StopRequest, TrainingInterrupted

number = int(sys.argv[1])
config = DistributedConfig(
    mode="explicit", coordinator_address=f"localhost:{sys.argv[2]}", process_count=2, process_id=number,
    local_devices="all", heartbeat_timeout_seconds=5, initialization_timeout_seconds=60,
)

def said(*words):
    print(*words, flush=True)

def steps(pause):
    # Each step is a sum over both processes, and dispatch runs two steps ahead, as in training.
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    x = jax.make_array_from_callback((2,), sharding, lambda index: np.ones(2, np.float32)[index])
    step = jax.jit(lambda x: 0.4 * x.sum() + 0.0 * x, out_shardings=sharding)
    pending = []
    for done in range(1, 10_000):
        x = step(x)
        pending.append(x)
        if len(pending) > 2:
            pending.pop(0).block_until_ready()
        time.sleep(pause)
        yield done

with exit_on_bad_input(), joined(config):
"""


def start(body: str) -> list[subprocess.Popen]:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    source = BEGINNING + "\n".join(f"    {line}" for line in body.strip().splitlines())
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", source, str(number), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def wait(processes: list[subprocess.Popen]) -> None:
    """Until all have ended, a minute at most: rounds are counted, so that a suspended machine does not count."""
    for _ in range(600):
        if all(process.poll() is not None for process in processes):
            return
        time.sleep(0.1)
    for process in processes:
        process.kill()
    raise AssertionError(f"after a minute still running: {[process.returncode for process in processes]}")


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, what they said, and their complaints."""
    wait(processes)
    outputs = [process.communicate() for process in processes]
    codes = [process.returncode for process in processes]
    said = ["\n".join(line for line in out.splitlines() if "Gloo" not in line) for out, _ in outputs]
    complaints = [
        "\n".join(line for line in err.splitlines() if line.startswith(("error", "inter"))) for _, err in outputs
    ]
    return codes, said, complaints


def test_what_the_main_process_finds_reaches_all_and_so_do_its_errors_and_a_request_to_stop():
    codes, said, complaints = finish(
        start(
            """
def read():
    assert is_main_process()
    return {"resumed": True}

def fail():
    raise OSError("the disk is on fire")

said(on_main_process("folder", read), on_main_process("folder", read))
barrier("here")
try:
    on_main_process("folder", fail)
except OSError as error:
    said(error)
with StopRequest() as stop:
    for done in steps(0.02 if number else 0.005):
        if number == 1 and done == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        if agree_to_stop(done, stop.requested):
            said("stops after", done)
            raise TrainingInterrupted(f"step {done} is saved")
"""
        )
    )
    assert said[0].splitlines()[:2] == ["{'resumed': True} {'resumed': True}", "the disk is on fire"]
    assert said[0] == said[1]
    stopped = int(said[0].split()[-1])
    # The one that is asked stands still until all know where to stop.
    assert 20 <= stopped <= 25
    assert codes == [130, 130]
    assert complaints == [f"interrupted: step {stopped} is saved"] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_the_other_with_its_words(failing):
    codes, _, complaints = finish(
        start(
            f"""
for done in steps(0.01):
    if number == {failing} and done == 20:
        raise ValueError("no more rows")
"""
        )
    )
    assert codes == [1, 1]
    assert complaints[failing] == "error: no more rows"
    assert complaints[1 - failing] == f"error: process {failing} failed: no more rows"


def test_a_killed_process_ends_the_other_although_it_waits_in_a_collective():
    processes = start("for done in steps(0.01): done == 20 and said('runs')")
    assert processes[1].stdout is not None
    while "runs" not in processes[1].stdout.readline():
        assert processes[1].poll() is None
    processes[1].send_signal(signal.SIGKILL)
    codes, _, complaints = finish(processes)
    assert codes == [1, -signal.SIGKILL]
    assert complaints[0] == (
        "error: process 1 is lost, it was silent for 5 s; start again to resume from the last checkpoint"
    )


def test_the_death_of_the_main_process_ends_the_others_too():
    processes = start("for done in steps(0.01): done == 20 and said('runs')")
    assert processes[0].stdout is not None
    while "runs" not in processes[0].stdout.readline():
        assert processes[0].poll() is None
    processes[0].send_signal(signal.SIGKILL)
    wait(processes)
    _, errors = processes[1].communicate()
    assert processes[1].returncode != 0
    assert "another task died" in errors


def test_one_process_alone_agrees_with_itself():
    with joined(DistributedConfig(**SETTINGS)):
        assert is_main_process()
        assert agree_to_stop(3, True)
        assert not agree_to_stop(3, False)
        assert on_main_process("anything", lambda: {"a": 1}) == {"a": 1}
        barrier("anything")


def test_where_no_cluster_is_recognised_auto_says_so(monkeypatch):
    for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    # JAX refuses to join once its devices run, as they do here; another process has none yet.
    source = (
        "from ring_rl.config import exit_on_bad_input\n"
        "from ring_rl.training.distributed import DistributedConfig, joined\n"
        f"with exit_on_bad_input(), joined(DistributedConfig(**{SETTINGS | {'mode': 'auto'}})): pass"
    )
    finished = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert finished.returncode == 1
    assert "error: no SLURM, Kubernetes, TPU pod or Open MPI is recognised here" in finished.stderr
    assert "set distributed.mode=explicit" in finished.stderr


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"process_id": 0}, "process_id set with mode=none; set mode=explicit"),
        ({"mode": "explicit", "process_count": 2}, "mode=explicit needs coordinator_address, process_id"),
        ({"mode": "explicit", "coordinator_address": "here", "process_count": 2, "process_id": 0}, "must be host:port"),
        (
            {"mode": "explicit", "coordinator_address": "a:1", "process_count": 2, "process_id": 2},
            "between 0 and process_count - 1, got process_id=2 and process_count=2",
        ),
        (
            {
                "mode": "explicit",
                "coordinator_address": "a:1",
                "process_count": 2,
                "process_id": 1,
                "local_devices": "one",
            },
            "local_devices=one needs mode=auto",
        ),
        ({"heartbeat_timeout_seconds": 1}, "heartbeat_timeout_seconds must be at least 5, got 1"),
    ],
)
def test_settings_must_make_sense(changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        DistributedConfig(**SETTINGS | changed)
