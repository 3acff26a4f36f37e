import json

from ring_rl.training.provenance import read_starts, record_start


def test_every_start_is_recorded_also_behind_a_torn_line(tmp_path):
    assert read_starts(tmp_path) == []
    record_start(tmp_path, 0)
    file = tmp_path / "starts.jsonl"
    file.write_text(file.read_text() + '{"step": 10, "comm')
    record_start(tmp_path, 20)
    starts = read_starts(tmp_path)
    assert [start["step"] for start in starts] == [0, 20]
    assert set(starts[0]) == {"step", "commit", "device", "versions"}
    assert " x " in starts[0]["device"]
    assert "jax" in starts[0]["versions"]
    assert json.loads(file.read_text().splitlines()[-1]) == starts[1]
