import json

import numpy as np
import pytest

from ring_rl.lm.key_words import key_words
from ring_rl.lm.tasks.line_retrieval import draw_lines
from ring_rl.lm.tasks.sample_files import check_new, longeval_testcase, read_longeval_responses, write_json_lines


def test_a_testcase_has_longevals_keys():
    sample = draw_lines(
        np.random.default_rng(0),
        lines=4,
        index_kind="words",
        words=key_words("small"),
        answer_start="none",
        depth=1.0,
    )
    testcase = json.loads(json.dumps(longeval_testcase(sample)))
    assert list(testcase) == ["random_idx", "expected_number", "num_lines", "correct_line", "prompt"]
    name, line = testcase["random_idx"]
    assert line == 3
    assert testcase["num_lines"] == 4
    # As its eval.py reads them: the line is the record's, and the number is in it.
    assert testcase["prompt"].count(testcase["correct_line"]) == 1
    assert testcase["correct_line"] == f"line {name}: REGISTER_CONTENT is <{testcase['expected_number']}>\n"


def test_a_file_is_there_in_full_or_not_at_all(tmp_path):
    def failing():
        yield {"a": 1}
        raise ValueError("the second record cannot be made")

    with pytest.raises(ValueError, match="second record"):
        write_json_lines(tmp_path / "new" / "file.jsonl", failing())
    assert list((tmp_path / "new").iterdir()) == []
    assert write_json_lines(tmp_path / "new" / "file.jsonl", [{"a": 1}, {"b": "é\n"}]) == 2
    lines = (tmp_path / "new" / "file.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1}, {"b": "é\n"}]
    with pytest.raises(FileExistsError, match="exists and is not overwritten"):
        write_json_lines(tmp_path / "new" / "file.jsonl", [])


def test_existing_files_are_known_before_work_starts(tmp_path):
    check_new(tmp_path, ["a.jsonl"])
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(FileExistsError, match=r"holds a\.jsonl already, and nothing is overwritten"):
        check_new(tmp_path, ["a.jsonl", "b.jsonl"])


class TestResponses:
    def test_predictions_may_hold_anything_but_a_newline(self, tmp_path):
        path = tmp_path / "200_response.txt"
        path.write_text(
            "Label: 41087, Predict: It is <41087>., Parsed: 41087, prompt length: 5000\n"
            "Label: 7, Predict: Label: 9, Predict: x, Parsed: 9, prompt length: 1, Parsed: 1, prompt length: 5001\n"
            "Label: 12, Predict: , Parsed: -1, prompt length: -1\n"
            "Accuracy: 0.34"
        )
        responses = read_longeval_responses(path)
        assert responses.labels == (41087, 7, 12)
        assert responses.outputs[1] == "Label: 9, Predict: x, Parsed: 9, prompt length: 1"
        assert responses.parsed == (41087, 1, -1)
        assert responses.accuracy == 0.34

    def test_an_interrupted_file_has_no_accuracy(self, tmp_path):
        path = tmp_path / "200_response.txt"
        path.write_text("Label: 1, Predict: 1, Parsed: 1, prompt length: 5\n")
        assert read_longeval_responses(path).accuracy is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("Accuracy: 0.5", "holds no responses"),
            ("Label: 1, Predict: 1", "line 1: expected 'Label: "),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, content, message):
        path = tmp_path / "200_response.txt"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_longeval_responses(path)
        with pytest.raises(FileNotFoundError, match="no responses at"):
            read_longeval_responses(tmp_path / "300_response.txt")
