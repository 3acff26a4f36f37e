"""The planner's memory beside what compilers said: the committed comparison, and how the script reports."""

import csv
import dataclasses
import fnmatch
import json
from functools import partial

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.planning.compiled_step import CompiledMemory


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("check_memory_model")


def composed_config(script, root, folder, *overrides):
    committed = root / "experiments" / "results"
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        composed = compose(
            "check_memory_model",
            overrides=[
                f"output={folder}/check",
                f"probes={folder}/probes.jsonl",
                f"lm_memory={committed}/lm_memory",
                f"memory_by_option={committed}/memory_by_option",
                *overrides,
            ],
        )
    return from_mapping(script.CheckConfig, resolve(composed))


@pytest.fixture
def configured(script, pytestconfig, tmp_path):
    return partial(composed_config, script, pytestconfig.rootpath, tmp_path)


@pytest.fixture(scope="module")
def committed(script, pytestconfig, tmp_path_factory):
    """Foretold anew; what compilers said is committed, whichever versions are installed here."""
    root = pytestconfig.rootpath
    names = ("check_memory_model/probes", "check_memory_model/context_limits_probes", "memory_by_slice/probes")
    files = ",".join(f"{root}/experiments/results/{name}.jsonl" for name in names)
    folder = tmp_path_factory.mktemp("committed")
    config = composed_config(script, root, folder, "compile=false", f"further_probes=[{files}]")
    return config, script.check(config)


def test_the_planner_is_within_a_tenth_of_compiled_steps_on_both_compilers(committed):
    _, comparisons = committed
    for compiler in ("tpu", "cpu"):
        found = [each for each in comparisons if each.compiler == compiler and "dense" not in each.name]
        assert len(found) >= 30
        worst = max(found, key=lambda each: abs(each.error))
        assert abs(worst.error) < 0.1, worst


def test_dense_attention_is_within_a_tenth_except_on_v4(committed):
    _, comparisons = committed
    dense = [each for each in comparisons if "dense" in each.name]
    on_v4 = [abs(each.error) for each in dense if each.name.startswith("v4:")]
    elsewhere = [abs(each.error) for each in dense if not each.name.startswith("v4:")]
    assert len(on_v4) >= 4
    assert len(elsewhere) >= 8
    assert max(on_v4) < 0.15
    assert max(elsewhere) < 0.1


def test_steps_that_nobody_fitted_are_foretold_too(committed):
    config, comparisons = committed
    held_out = [
        abs(each.error)
        for each in comparisons
        if each.compiler == "tpu" and "dense" not in each.name and not each.fitted(config.fitted)
    ]
    assert len(held_out) >= 8
    assert max(held_out) < 0.1
    assert sorted(held_out)[len(held_out) // 2] < 0.05


def test_steps_known_from_elsewhere_have_the_names_of_their_cases_or_a_description(committed):
    config, comparisons = committed
    names = {each.name for each in comparisons}
    assert "tpu: base" in names
    assert any(name.startswith("v5e:16x16: 32 layers of 4096, ring of ") for name in names)
    for pattern in config.fitted:
        assert any(fnmatch.fnmatchcase(name, pattern) for name in names | config.chosen().keys()), pattern


def test_what_is_missing_is_compiled_once_and_reported(script, configured, tmp_path, monkeypatch):
    asked = []

    def compiled(self, request, machine):
        asked.append(request)
        planned = script.compared("", machine.name, request, 1).planned_bytes
        return CompiledMemory(
            # The second is a refusal; the others are 20 % above the formula.
            peak_bytes=None if len(asked) == 2 else round(1.2 * planned),
            wanted_bytes=None,
            limit_bytes=None,
            state_bytes=1,
            attention_block="auto",
            lower_seconds=1.0,
            compile_seconds=1.0,
        )

    monkeypatch.setattr(script.CompileProcesses, "compile", compiled)
    nothing_else = ("further_probes=[]", "lm_memory=null", "memory_by_option=null")
    config = configured("groups=[cpu]", "overwrite=true", *nothing_else)
    comparisons = script.check(config)
    assert len(asked) == len(config.cases["cpu"])
    assert len(comparisons) == len(asked) - 1
    assert (
        script.last_line(config, comparisons) == f"worst_error=0.167 median_error=0.167 within_10=0/{len(comparisons)}"
    )
    some_held_out = dataclasses.replace(config, fitted=("cpu: bfloat16*",))
    assert script.last_line(some_held_out, comparisons).endswith(" held_out_worst_error=0.167")
    assert script.check(config) == comparisons
    assert len(asked) == len(config.cases["cpu"])
    with (tmp_path / "check" / "memory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows] == pytest.approx([-1 / 6] * len(rows), abs=1e-3)
    summary = json.loads((tmp_path / "check" / "summary.json").read_text())
    assert (summary["compared"], summary["within_tolerance"]) == (len(rows), 0)
    assert {row["fitted"] for row in rows} == {"true"}
    assert summary["errors"].keys() == {"cpu, fitted"}
    assert summary["errors"]["cpu, fitted"]["compared"] == len(rows)
    assert (tmp_path / "check" / "memory.png").stat().st_size > 0


def test_every_case_makes_sense(configured):
    assert len(configured().chosen()) >= 30


def test_bad_input_is_refused(script, configured):
    with pytest.raises(ValueError, match="groups names 'gpu'"):
        configured("groups=[gpu]")
    with pytest.raises(ValueError, match=r"unknown key 'cases\.cpu\.wide\.breadth'"):
        configured("groups=[cpu]", "+cases.cpu.wide={breadth: 3}").chosen()
    with pytest.raises(ValueError, match="nothing to compare"):
        script.check(configured("compile=false", "further_probes=[]", "lm_memory=null", "memory_by_option=null"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        script.check(configured("compile=false", "further_probes=[missing.jsonl]"))
