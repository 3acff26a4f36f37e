from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from ring_rl.atomic_file import write_whole
from ring_rl.training.run_directory import open_run_directory

CONFIG = {
    "seed": 0,
    "optimizer": {"learning_rate": 1e-5, "betas": [0.9, 0.999], "clip": None},
    "title": "a: b # c",
    "run_dir": "runs/a",
}


def with_value(**values: object) -> dict:
    return {**CONFIG, **values}


def test_a_new_run_has_its_places(tmp_path):
    with open_run_directory(tmp_path / "deep" / "run", CONFIG) as run:
        assert not run.resumed
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
        assert run.metrics.read_text() == ""
        assert run.checkpoints.is_dir()
        assert run.plots.is_dir()


def test_the_same_configuration_resumes_and_touches_nothing(tmp_path):
    with open_run_directory(tmp_path, CONFIG) as run:
        run.metrics.write_text('{"step": 1}\n')
    before = (tmp_path / "config.yaml").stat().st_mtime_ns
    with open_run_directory(tmp_path, CONFIG) as run:
        assert run.resumed
        assert run.metrics.read_text() == '{"step": 1}\n'
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == before


def test_another_configuration_is_refused_key_by_key(tmp_path):
    open_run_directory(tmp_path, CONFIG).close()
    other = with_value(seed=1, optimizer={**CONFIG["optimizer"], "learning_rate": 1e-4})
    message = "optimizer.learning_rate: saved 1e-05, wanted 0.0001; seed: saved 0, wanted 1); choose another"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_run_directory(tmp_path, other)
    # The refusal gives the lock back.
    open_run_directory(tmp_path, CONFIG).close()


def test_keys_that_say_nothing_about_the_result_may_differ(tmp_path):
    open_run_directory(tmp_path, CONFIG).close()
    moved = with_value(run_dir="runs/b")
    with open_run_directory(tmp_path, moved, may_differ=("run_dir",)) as run:
        assert run.resumed
    with pytest.raises(ValueError, match="run_dir: saved"):
        open_run_directory(tmp_path, moved)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not empty and holds no run \(it has thesis\.tex, but no config\.yaml"):
        open_run_directory(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file; choose another run_dir"):
        open_run_directory(tmp_path / "thesis.tex", CONFIG)


def test_what_hydra_or_an_early_death_left_is_no_obstacle(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "train.log").touch()
    (tmp_path / "run.lock").touch()
    (tmp_path / ".config.abc123.yaml").touch()
    with open_run_directory(tmp_path, CONFIG) as run:
        assert not run.resumed


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [1"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml .*choose another run_dir"):
        open_run_directory(tmp_path, CONFIG)


def test_one_process_at_a_time_and_the_dead_do_not_count(tmp_path):
    source = (
        "import pathlib, sys, time; from ring_rl.training.run_directory import open_run_directory\n"
        "run = open_run_directory(pathlib.Path(sys.argv[1]), {'seed': 0})\n"
        "print('open', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", source, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=rf"another process \(pid {holder.pid}\) has the run .* open"):
            open_run_directory(tmp_path, {"seed": 0})
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with open_run_directory(tmp_path, {"seed": 0}) as run:
        assert run.resumed
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_whole(file, "old")

    def failing_fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
