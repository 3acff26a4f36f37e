"""Runs one entry point as several processes on this machine, as a cluster would on several.

    python experiments/launch.py --processes 2 -- experiments/train_agent.py virtual_devices=4 mesh.sp=8

`virtual_devices` and what the entry point prints are those of one process; `mesh` is that of all together. On a machine
with GPUs, `--devices 0,1 2,3` shows each process its own.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# What a process may need to save its state after a signal, before it is killed.
PATIENCE_SECONDS = 600.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Our options, and the entry point with its overrides after `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--devices", nargs="+", metavar="IDS", help="GPUs of each process, such as: 0,1 2,3 (default: all for each)"
    )
    parser.add_argument(
        "--last-words",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long the others may go on after one has failed, to notice it and to say so (default: 60)",
    )
    parser.add_argument("command", nargs="+", metavar="-- SCRIPT [OVERRIDES]", help="an entry point and its overrides")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if options.devices is not None and len(options.devices) != options.processes:
        parser.error(f"--devices names {len(options.devices)} groups for {options.processes} processes")
    if not os.path.exists(options.command[0]):
        parser.error(f"there is no script {options.command[0]}")
    return options


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(options: argparse.Namespace) -> list[subprocess.Popen]:
    """One process for each number, in a session of its own, so that a Ctrl-C here reaches it once, through us."""
    address = f"localhost:{free_port()}"
    processes = []
    for number in range(options.processes):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if options.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = options.devices[number]
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    *options.command,
                    "distributed.mode=explicit",
                    f"distributed.coordinator_address={address}",
                    f"distributed.process_count={options.processes}",
                    f"distributed.process_id={number}",
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )
    return processes


def copy_lines(number: int, source, target) -> None:
    """Each line as it comes, with the process's number before it."""
    for line in iter(source.readline, b""):
        target.write(f"[{number}] ".encode() + line.rstrip(b"\n") + b"\n")
        target.flush()


def wait(processes: list[subprocess.Popen], *, last_words_seconds: float) -> int:
    """The first exit code that is not 0, once all have ended; a failed one takes the others with it."""
    first = 0
    kill_at = None
    while any(process.poll() is None for process in processes):
        failed = next((process.returncode for process in processes if process.poll() not in (None, 0)), 0)
        if failed and first == 0:
            first = failed
            # One that was interrupted has saved its state, and so will the others.
            interrupted = failed == 128 + signal.SIGINT
            kill_at = time.monotonic() + (PATIENCE_SECONDS if interrupted else last_words_seconds)
        if kill_at is not None and time.monotonic() > kill_at:
            for process in processes:
                send(process, signal.SIGKILL)
        time.sleep(0.05)
    return first or next((process.returncode for process in processes if process.returncode), 0)


def send(process: subprocess.Popen, number: int) -> None:
    """A signal to one that still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def main() -> int:
    """Starts, watches and ends the processes."""
    options = parse_arguments()
    processes = start(options)

    def forward(number: int, _: object) -> None:
        for process in processes:
            send(process, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    copiers = [
        threading.Thread(target=copy_lines, args=(number, source, target))
        for number, process in enumerate(processes)
        for source, target in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
    ]
    for copier in copiers:
        copier.start()
    code = wait(processes, last_words_seconds=options.last_words)
    for copier in copiers:
        copier.join()
    if code:
        ended = ", ".join(f"process {number}: {process.returncode}" for number, process in enumerate(processes))
        print(f"error: exit codes are {ended}", file=sys.stderr)
    # A process that a signal killed counts as the shell counts it.
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
