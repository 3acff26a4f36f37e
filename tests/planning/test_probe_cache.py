"""What was compiled is known again, after whatever end of the process that compiled it."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.planning.probe_cache import CachedProbe, ProbeCache, open_probe_cache, probe_key, read_probes

VERSIONS = {"jax": "1", "libtpu": "2"}


@pytest.fixture(scope="session")
def probe_of(ring_request, compiled):
    def probe(context, peak=1000):
        key = probe_key(dataclasses.replace(ring_request, context=context), "v5e:2x4", VERSIONS)
        return CachedProbe(key=key, memory=compiled(peak_bytes=peak), commit="abc")

    return probe


def test_what_is_put_is_there_at_once_and_in_the_next_process(tmp_path, probe_of):
    path = tmp_path / "made" / "probes.jsonl"
    with open_probe_cache(path) as cache:
        assert cache.get(probe_of(8).key) is None
        cache.put(probe_of(8))
        cache.put(probe_of(16, peak=None))
        assert path.read_text().count("\n") == 2
        assert cache.get(probe_of(8).key) == probe_of(8)
    with open_probe_cache(path) as cache:
        assert cache.all() == [probe_of(8), probe_of(16, peak=None)]


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": "v5e:4x4"},
        {"versions": VERSIONS | {"libtpu": "3"}},
        {"request.loss_chunks": 3},
        {"request.model.transformer.layers": 3},
        {"request.optimizer.beta1": 0.8},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_everything_that_determines_an_answer_is_part_of_its_key(tmp_path, probe_of, changed):
    ((path, value),) = changed.items()
    other = probe_of(8)
    *parents, last = path.split(".")
    place = other.key
    for parent in parents:
        place = place[parent]
    place[last] = value
    with open_probe_cache(tmp_path / "probes.jsonl") as cache:
        cache.put(probe_of(8))
        assert cache.get(other.key) is None


@given(st.data())
def test_a_file_torn_anywhere_loses_the_torn_line_alone(tmp_path_factory, probe_of, data):
    path = tmp_path_factory.mktemp("torn") / "probes.jsonl"
    cache = ProbeCache(path)
    for context in (8, 16, 24):
        cache.put(probe_of(context))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    # A line that lacks its newline alone is whole.
    kept = sum(len(whole.splitlines()[i]) + sum(map(len, whole.splitlines(True)[:i])) <= cut for i in range(3))
    torn = ProbeCache(path)
    assert torn.all() == [probe_of(context) for context in (8, 16, 24)[:kept]]
    torn.put(probe_of(32))
    assert read_probes(path) == [*(probe_of(context) for context in (8, 16, 24)[:kept]), probe_of(32)]


def test_of_two_answers_the_later_counts_and_strange_lines_are_left_out(tmp_path, probe_of):
    path = tmp_path / "probes.jsonl"
    cache = ProbeCache(path)
    cache.put(probe_of(8, peak=1))
    with path.open("a") as file:
        file.write('{"key": {}, "memory": {"peak": 1}, "commit": null}\n[]\n')
    cache.put(probe_of(8, peak=2))
    assert read_probes(path) == [probe_of(8, peak=2)]


def test_one_process_writes_and_its_end_frees_the_file(tmp_path):
    path = tmp_path / "probes.jsonl"
    holder = (
        f"import fcntl, sys\nlock = open({str(tmp_path / '.probes.jsonl.lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match="another process"), open_probe_cache(path):
            pass
    finally:
        process.kill()
        process.communicate()
    with open_probe_cache(path):
        pass


@pytest.mark.parametrize("content", ["machine,model\nv5e-8,small\n", "\0\1", '{"other": 1}\n'])
def test_nothing_is_added_to_a_file_of_something_else(tmp_path, content):
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(ValueError, match="no file of probes"), open_probe_cache(path):
        pass
    assert path.read_text() == content


@pytest.mark.parametrize("torn", ["", "{", '{"ke', '{"key": {"requ'])
def test_a_file_whose_first_line_was_torn_goes_on(tmp_path, torn):
    path = tmp_path / "probes.jsonl"
    path.write_text(torn)
    with open_probe_cache(path) as cache:
        assert cache.all() == []
