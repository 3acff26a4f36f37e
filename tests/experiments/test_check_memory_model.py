"""The planner's memory beside what compilers said: the committed comparison, and how the script reports."""

import csv
import json

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.planning.compiled_step import CompiledMemory


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("check_memory_model")


@pytest.fixture
def configured(script, pytestconfig, tmp_path):
    def configured(*overrides):
        root = pytestconfig.rootpath
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            committed = root / "experiments" / "results"
            composed = compose(
                "check_memory_model",
                overrides=[
                    f"output={tmp_path}/check",
                    f"probes={tmp_path}/probes.jsonl",
                    f"lm_memory={committed}/lm_memory",
                    f"memory_by_option={committed}/memory_by_option",
                    *overrides,
                ],
            )
        return from_mapping(script.CheckConfig, resolve(composed))

    return configured


def test_the_planner_is_within_a_tenth_of_at_least_thirty_compiled_steps(script, configured, pytestconfig):
    """Foretold anew; what compilers said is committed, whichever versions are installed here."""
    committed = pytestconfig.rootpath / "experiments" / "results" / "check_memory_model" / "probes.jsonl"
    comparisons = script.check(configured("compile=false", f"further_probes=[{committed}]"))
    assert len(comparisons) >= 30
    assert {each.compiler for each in comparisons} == {"cpu", "tpu"}
    worst = max(comparisons, key=lambda each: abs(each.error))
    assert abs(worst.error) < 0.1, worst


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
    config = configured("groups=[cpu]", "lm_memory=null", "memory_by_option=null", "overwrite=true")
    comparisons = script.check(config)
    assert len(asked) == len(config.cases["cpu"])
    assert len(comparisons) == len(asked) - 1
    assert (
        script.last_line(config, comparisons) == f"worst_error=0.167 median_error=0.167 within_10=0/{len(comparisons)}"
    )
    assert script.check(config) == comparisons
    assert len(asked) == len(config.cases["cpu"])
    with (tmp_path / "check" / "memory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows] == pytest.approx([-1 / 6] * len(rows), abs=1e-3)
    summary = json.loads((tmp_path / "check" / "summary.json").read_text())
    assert (summary["compared"], summary["within_tolerance"]) == (len(rows), 0)
    assert (tmp_path / "check" / "memory.png").stat().st_size > 0


def test_every_case_makes_sense(configured):
    assert len(configured().chosen()) >= 30


def test_bad_input_is_refused(script, configured):
    with pytest.raises(ValueError, match="groups names 'gpu'"):
        configured("groups=[gpu]")
    with pytest.raises(ValueError, match=r"unknown key 'cases\.cpu\.wide\.breadth'"):
        configured("groups=[cpu]", "+cases.cpu.wide={breadth: 3}").chosen()
    with pytest.raises(ValueError, match="nothing to compare"):
        script.check(configured("compile=false", "lm_memory=null", "memory_by_option=null"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        script.check(configured("compile=false", "further_probes=[missing.jsonl]"))
