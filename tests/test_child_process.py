"""Commands are waited for, also through Ctrl-C."""

import signal
import subprocess
import sys
import time

from ring_rl.child_process import run_to_its_end


def test_the_exit_code_comes_back(tmp_path):
    code = "import pathlib, sys; pathlib.Path('here').touch(); sys.exit(3)"
    assert run_to_its_end([sys.executable, "-c", code], folder=tmp_path) == 3
    assert (tmp_path / "here").exists()


def test_a_command_that_is_interrupted_may_save_what_it_has(tmp_path):
    """A training saves the step it is at when Ctrl-C reaches it, which takes a while."""
    begun, saved = tmp_path / "begun", tmp_path / "saved"
    # Stands for a command that heard the same signal and is saving.
    touch = "pathlib.Path({!r}).touch()"
    command = f"import pathlib, time; {touch.format(str(begun))}; time.sleep(2); {touch.format(str(saved))}"
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-c",
            # A shell that puts the tests into the background leaves Ctrl-C ignored.
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from ring_rl.child_process import run_to_its_end; run_to_its_end(sys.argv[1:])",
            *(sys.executable, "-c", command),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not begun.exists():
        assert waiting.poll() is None
        time.sleep(0.01)
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=60)
    assert saved.exists()
    assert "KeyboardInterrupt: the same command again goes on from here" in said
