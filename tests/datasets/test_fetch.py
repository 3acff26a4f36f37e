"""The script as a user runs it, against a server on this machine."""

import functools
import subprocess
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ring_rl.agent.episodes.exorl import read_episodes

SCRIPT = Path(__file__).parents[2] / "datasets" / "exorl" / "fetch.py"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Keeps the tests' output clean."""


@pytest.fixture
def base_url(tmp_path):
    """A server of one small data set in the published form: walker/rnd.zip with buffer/ and video/."""
    published = tmp_path / "published" / "walker"
    published.mkdir(parents=True)
    rows = {"observation": (9, 24), "action": (9, 6), "reward": (9, 1), "discount": (9, 1)}
    with zipfile.ZipFile(published / "rnd.zip", "w") as archive:
        for index in range(3):
            with archive.open(f"buffer/episode_{index:06d}_8.npz", "w") as file:
                np.savez(file, **{key: np.zeros(shape, np.float32) for key, shape in rows.items()})
        archive.writestr("video/0.mp4", b"film")
    (published / "icm.zip").write_bytes(b"not an archive")
    handler = functools.partial(QuietHandler, directory=str(published.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_data_set_is_fetched_and_reads(base_url, tmp_path):
    arguments = ("walker", "rnd", "--root", str(tmp_path / "data"), "--base-url", base_url)
    first = run(*arguments)
    folder = tmp_path / "data" / "walker" / "rnd"
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"4 files written to {folder}, 0 were there already\n"
    assert len(read_episodes(folder / "buffer", max_episodes=None, progress=False).trajectories) == 3
    assert sorted(path.name for path in (tmp_path / "data" / "walker").iterdir()) == ["rnd"]
    again = run(*arguments)
    assert again.stdout == f"{folder} was fetched before; to fetch it again, move it away\n"


@pytest.mark.parametrize(
    ("domain", "algorithm", "message"),
    [
        ("walker", "proto", "walker/proto.zip is not on the server (HTTP 404)"),
        ("walker", "icm", "icm.zip is damaged or no zip archive"),
    ],
)
def test_failures_are_one_line(base_url, tmp_path, domain, algorithm, message):
    result = run(domain, algorithm, "--root", str(tmp_path / "data"), "--base-url", base_url)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    result = run("hopper", "rnd", "--root", str(tmp_path))
    assert result.returncode == 2
    assert "quadruped" in result.stderr
