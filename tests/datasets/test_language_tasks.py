"""The scripts of line retrieval, needles and RULER, on the configurations that stand in conf/."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = {
    "line_retrieval": ("generate", "generate_line_retrieval"),
    "needle": ("generate", "generate_needle"),
    "ruler": ("generate", "generate_ruler"),
    "rescore": ("rescore", "rescore_longeval"),
}


@pytest.fixture
def call(monkeypatch, capsys):
    """`call("needle", *overrides)`: what the script prints, and its exit status."""

    def run(task, *overrides):
        name, config_name = SCRIPTS[task]
        folder = "line_retrieval" if task == "rescore" else task
        path = REPOSITORY / "datasets" / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
        script = importlib.util.module_from_spec(spec)
        # Dataclasses look their annotations up in the module's own entry.
        monkeypatch.setitem(sys.modules, spec.name, script)
        spec.loader.exec_module(script)
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            cfg = compose(config_name, overrides=list(overrides))
        status = 0
        try:
            script.main.__wrapped__(cfg)
        except SystemExit as stopped:
            status = stopped.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_written_as_longeval_reads_them(call, tmp_path):
    options = ["lines=[3,5]", "samples=2", "words=small", f"output={tmp_path / 'out'}"]
    status, out, _ = call("line_retrieval", *options)
    assert status == 0
    assert out.splitlines()[0] == f"2 records of 3 lines in {tmp_path / 'out' / '3_lines.jsonl'}"
    records = read(tmp_path / "out" / "5_lines.jsonl")
    assert len(records) == 2
    assert records[0] != records[1]
    assert all(len(re.findall("^line ", record["prompt"], re.MULTILINE)) == 5 for record in records)
    status, _, err = call("line_retrieval", *options)
    assert status == 1
    assert "holds 3_lines.jsonl, 5_lines.jsonl already, and nothing is overwritten" in err


@pytest.mark.parametrize(
    ("options", "count"), [(["samples=1"], 11), (["style=lwm", "needles=4", "retrieved=2", "samples=3"], 3)]
)
def test_needles_are_written(call, tmp_path, options, count):
    status, _, err = call("needle", "lengths=[1500]", f"output={tmp_path}", *options)
    assert status == 0, err
    records = read(tmp_path / "1500_tokens.jsonl")
    assert len(records) == count
    assert len({record["prompt"] for record in records}) == count
    assert all(answer in record["prompt"] for record in records for answer in record["answers"])


def test_ruler_is_written_as_ruler_reads_it(call, tmp_path):
    pytest.importorskip("wonderwords", reason="brings RULER's words")
    status, _, err = call("ruler", "lengths=[4000]", "tasks=[vt,fwe]", "samples=2", f"output={tmp_path}")
    assert status == 0, err
    for task in ("vt", "fwe"):
        records = read(tmp_path / "4000" / task / "validation.jsonl")
        assert [record["index"] for record in records] == [0, 1]
        assert all(3000 < record["length"] <= 4000 for record in records)
        assert list(records[0]) == ["index", "input", "outputs", "length", "answer_prefix"]


def test_lengths_that_are_too_short_are_known_before_anything_is_written(call, tmp_path):
    pytest.importorskip("wonderwords", reason="brings RULER's words")
    status, _, err = call("ruler", "lengths=[1500]", "tasks=[fwe,vt]", "samples=2", f"output={tmp_path}")
    assert status == 1
    assert "error: the smallest context of vt takes" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("line_retrieval", ["words=small", "lines=[2,20000]"], "these words name 16384 lines, got 20000"),
        ("needle", ["lengths=[1500,200]"], "tokens hold no text besides 1 needles"),
        ("needle", ["lengths=[1500]", "depths=[0.0,1.5]"], "depth must lie in [0, 1], got 1.5"),
    ],
)
def test_what_only_the_last_file_lacks_is_known_before_the_first_is_written(call, tmp_path, task, options, message):
    status, _, err = call(task, "samples=1", f"output={tmp_path}", *options)
    assert status == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["conf/generate_ruler.yaml", "datasets/ruler/generate.py"])
def test_the_command_that_is_given_for_ruler_fits_all_tasks(call, tmp_path, folder):
    pytest.importorskip("wonderwords", reason="brings RULER's words")
    (lengths,) = re.findall(r"generate\.py (lengths=\S+) output=", (REPOSITORY / folder).read_text())
    smallest = lengths.partition(",")[0] + "]"
    status, _, err = call("ruler", smallest, "samples=1", f"output={tmp_path}")
    assert status == 0, err
    assert len(list(tmp_path.rglob("validation.jsonl"))) == 6


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("needle", ["needles=4", "style=lwm", "distractors=3"], "distractors=3 go with one needle"),
        ("needle", ["retrieved=2"], "got retrieved=2 of needles=1"),
        ("needle", ["needles=2"], "several needles are LWM's: set style=lwm"),
        ("needle", ["lengths=[]"], "name at least one each"),
        ("ruler", ["samples=0"], "samples is at least 1"),
        ("line_retrieval", ["lines=[0]"], "must be positive"),
    ],
)
def test_impossible_configurations_are_one_line(call, tmp_path, task, options, message):
    status, _, err = call(task, f"output={tmp_path}", *options)
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


class TestRescoring:
    def write(self, folder, parsed, accuracy):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "200_response.txt").write_text(
            "Label: 41087, Predict: It is <41087>., Parsed: 41087, prompt length: 5000\n"
            f"Label: 12, Predict: 3 or 12, Parsed: {parsed}, prompt length: 5001\n"
            f"Accuracy: {accuracy}"
        )

    def test_agreement_is_said(self, call, tmp_path):
        self.write(tmp_path, 12, 1.0)
        status, out, _ = call("rescore", f"responses={tmp_path}")
        assert status == 0
        assert out.splitlines() == [
            "model 200 lines: 2/2 = 1.00, LongEval 1.00",
            "the scorers agree on all 2 answers in 1 files",
        ]

    @pytest.mark.parametrize(("parsed", "accuracy"), [(3, 1.0), (12, 0.5)])
    def test_so_is_a_difference(self, call, tmp_path, parsed, accuracy):
        self.write(tmp_path, parsed, accuracy)
        status, _, err = call("rescore", f"responses={tmp_path}")
        assert status == 1
        assert "the scorers differ on model 200 lines" in err

    def test_an_empty_folder_is_no_agreement(self, call, tmp_path):
        status, _, err = call("rescore", f"responses={tmp_path}")
        assert status == 1
        assert "holds no <model>/<n>_response.txt" in err


@pytest.mark.parametrize("folder", ["line_retrieval", "needle", "ruler"])
def test_the_files_that_the_cards_name_exist(folder):
    card = (REPOSITORY / "datasets" / folder / "README.md").read_text()
    names = re.findall(r"(?:python |`)((?:experiments|datasets|conf|ring_rl)/\S+?\.(?:py|yaml))", card)
    assert len(names) >= 2
    assert [name for name in names if not (REPOSITORY / name).is_file()] == []
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", card):
        assert (REPOSITORY / "datasets" / folder / link).exists(), link
