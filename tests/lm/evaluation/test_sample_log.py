import json

import pytest

from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.evaluation.sample_log import SampleLog, read_samples

IDENTITY = {"source": {"run_dir": "runs/a", "step": 140}, "suite": {"samples": 3, "lengths": [64, 128]}}


def opened(folder, identity=IDENTITY, **options):
    return SampleLog(folder, record_type=SampleRecord, key=lambda record: record.key, identity=identity, **options)


def read(folder):
    return read_samples(folder, record_type=SampleRecord, key=lambda record: record.key)


def test_what_was_written_is_there_again(tmp_path, record):
    written = [record(index=index, depth=0.25, score=0.5, negative_log_likelihood=0.125) for index in range(3)]
    with opened(tmp_path / "out") as log:
        log.append(written[:2])
        log.append(written[2:])
    assert read(tmp_path / "out") == written
    with opened(tmp_path / "out") as log:
        assert list(log.records.values()) == written
        assert written[0].key in log.records
        assert record(index=3).key not in log.records


def test_a_line_that_a_crash_tore_is_evaluated_again_and_nothing_else_is(tmp_path, record):
    with opened(tmp_path) as log:
        log.append([record(index=0), record(index=1)])
    file = tmp_path / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert read(tmp_path) == [record(index=0)]
    with opened(tmp_path) as log:
        assert list(log.records.values()) == [record(index=0)]
        log.append([record(index=1)])
    assert read(tmp_path) == [record(index=0), record(index=1)]


def test_another_evaluation_is_refused_and_what_may_differ_is_not(tmp_path, record):
    with opened(tmp_path) as log:
        log.append([record()])
    other = {**IDENTITY, "source": {"run_dir": "runs/a", "step": 280}}
    with pytest.raises(ValueError, match=r"another evaluation \(source.step: saved 140, wanted 280\)"):
        opened(tmp_path, other)
    more = {**IDENTITY, "suite": {"samples": 200, "lengths": [64]}}
    with opened(tmp_path, more, may_differ=("suite.samples", "suite.lengths")) as log:
        assert len(log.records) == 1
    with pytest.raises(ValueError, match="another evaluation"):
        opened(tmp_path, more, may_differ=("suite.samples",))
    assert read(tmp_path) == [record()]
    # An evaluation from before `weights` was written down goes on.
    opened(tmp_path, {**IDENTITY, "weights": "0f"}).close()
    with pytest.raises(ValueError, match="suite"):
        opened(tmp_path, {"source": IDENTITY["source"]})


def test_no_second_process_writes_beside_the_first(tmp_path):
    with opened(tmp_path), pytest.raises(ValueError, match="another process is writing"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_sample_counts_once(tmp_path, record):
    with opened(tmp_path) as log:
        log.append([record()])
        with pytest.raises(ValueError, match="evaluated twice"):
            log.append([record(score=0.0)])
    assert read(tmp_path) == [record()]
    file = tmp_path / "samples.jsonl"
    file.write_text(file.read_text() * 2)
    with pytest.raises(ValueError, match=r"line 2 repeats the sample"):
        opened(tmp_path)


def test_a_damaged_line_is_named(tmp_path, record):
    with opened(tmp_path) as log:
        log.append([record(index=0), record(index=1)])
    file = tmp_path / "samples.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(f"{json.dumps({**json.loads(first), 'scor': 1})}\n{second}\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged \(unknown key 'scor'; did you mean 'score'"):
        opened(tmp_path)


def test_somebody_elses_samples_are_left_alone(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match=r"holds samples, but no evaluation.json"):
        opened(tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == '{"mine": 1}\n'
    with pytest.raises(FileNotFoundError, match="evaluate first"):
        read(tmp_path / "nowhere")
