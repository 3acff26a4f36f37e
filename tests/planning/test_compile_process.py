"""Compilers in processes of their own: answers, complaints, and ends."""

import dataclasses
import subprocess
import sys
import threading
import time

import pytest

from ring_rl.planning import compile_process
from ring_rl.planning.compile_process import CompilationFailedError, CompileProcesses, key_of, remembered
from ring_rl.planning.probe_cache import open_probe_cache
from ring_rl.planning.topology import machine_named

NODE = machine_named("gpu:2xA100-80GB")
# A stand-in for the other side, which says one thing; %r is what.
SAYS = "import sys; sys.stdin.readline(); print('noise'); print(%r); print('last words', file=sys.stderr)"


@pytest.fixture
def other_side(monkeypatch):
    """`other_side(code)`: what runs in place of the compiler."""

    def replace(code):
        started = subprocess.Popen

        def popen(command, **options):
            assert command == [sys.executable, "-m", "ring_rl.planning.compile_process"]
            return started([sys.executable, "-c", code], **options)

        monkeypatch.setattr(compile_process.subprocess, "Popen", popen)

    return replace


def test_a_step_is_compiled_in_another_process_and_remembered(tmp_path, ring_request):
    with open_probe_cache(tmp_path / "probes.jsonl") as cache:
        with CompileProcesses() as processes:
            memory = remembered(ring_request, NODE, cache=cache, processes=processes)
        assert memory.peak_bytes > memory.state_bytes > 0
        (probe,) = cache.all()
        assert probe.key == key_of(ring_request, NODE)
        assert (probe.key["machine"], probe.memory) == ("cpu x 2", memory)
        # Nothing can be compiled any more, and nothing has to be.
        assert remembered(ring_request, NODE, cache=cache, processes=processes) == memory


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ('{"error": "ValueError", "message": "no"}', ValueError),
        ('{"error": "ImportError", "message": "no"}', ImportError),
    ],
)
def test_complaints_come_back_as_what_they_were(other_side, ring_request, said, error):
    other_side(SAYS % said)
    with CompileProcesses() as processes, pytest.raises(error, match=r"^no$"):
        processes.compile(ring_request, NODE)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.exit('a bug')", "exit code 1: a bug"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed; .* set processes=1"),
        ("pass", "exit code 0: it said nothing"),
    ],
)
def test_a_compiler_that_dies_is_an_error_that_says_how(other_side, ring_request, code, says):
    other_side(code)
    with CompileProcesses() as processes, pytest.raises(CompilationFailedError, match=says):
        processes.compile(ring_request, NODE)


def test_much_talk_does_not_block(other_side, ring_request):
    other_side("import sys; print('x' * 10**6, file=sys.stderr); print('x' * 10**6); sys.exit(3)")
    with CompileProcesses() as processes, pytest.raises(CompilationFailedError, match="exit code 3"):
        processes.compile(ring_request, NODE)


def test_leaving_ends_compilers_that_run_and_starts_no_more(other_side, ring_request):
    other_side("import time; time.sleep(600)")
    failures = []

    def compile_in_vain():
        with pytest.raises(CompilationFailedError) as failure:
            processes.compile(ring_request, NODE)
        failures.append(str(failure.value))

    with CompileProcesses() as processes:
        thread = threading.Thread(target=compile_in_vain)
        thread.start()
        while not processes.running:
            time.sleep(0.01)
    thread.join(timeout=60)
    assert len(failures) == 1
    assert not processes.running
    with pytest.raises(CompilationFailedError, match="ended"):
        processes.compile(ring_request, NODE)


def test_a_compiler_ends_when_whoever_asked_is_gone(ring_request):
    code = (
        "import time\nfrom ring_rl.planning import compile_process\n"
        "compile_process._answer = lambda question: time.sleep(600)\ncompile_process.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"{}\n")
    process.stdin.close()
    assert process.wait(timeout=120) == 1
    process.stdout.close()


def test_machines_that_compile_alike_share_their_answers(ring_request, monkeypatch):
    assert key_of(ring_request, NODE) == key_of(ring_request, machine_named("gpu:2xH200-141GB"))
    assert key_of(ring_request, NODE) != key_of(ring_request, machine_named("gpu:4xA100-80GB"))
    assert key_of(ring_request, NODE) != key_of(dataclasses.replace(ring_request, context=512), NODE)
    before = key_of(ring_request, NODE)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    assert key_of(ring_request, NODE) != before
