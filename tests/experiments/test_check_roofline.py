"""The count of time beside measured and published figures, and the committed comparison."""

import csv
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

COMMITTED = Path(__file__).parents[2] / "experiments" / "results" / "check_roofline"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("check_roofline")


@pytest.fixture
def configured(script, pytestconfig, tmp_path):
    def configured(*overrides):
        root = pytestconfig.rootpath
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            timings = f"timings={root}/experiments/results/kernels/cpu/results.json"
            composed = compose("check_roofline", overrides=[timings, f"output={tmp_path}/check", *overrides])
        return from_mapping(script.CheckConfig, resolve(composed))

    return configured


def case(name, *, seconds, tokens=128, **changes):
    return {
        "name": name,
        "implementation": "ring_rl",
        "mask": "causal",
        "local": "xla",
        "document_lengths": None,
        "window": None,
        "tokens": tokens,
        "batch": 3,
        "heads": 4,
        "head_dim": 8,
        "dtype": "float32",
        "strategy": "ring",
        "layout": "zigzag",
        "ring_size": 4,
        "ulysses_size": 1,
        "forward_backward_seconds": seconds,
        **changes,
    }


def test_one_rate_is_that_of_the_least_largest_error(script, configured):
    flops = 14 * 3 * 4 * 8 * 128 * 129 // 2
    cases = [
        case("fast", seconds=[1.0, 2.0, 9.0]),
        case("slow", seconds=[4.0], strategy="blockwise", ring_size=1, layout="contiguous"),
        case("short", seconds=[1.0], tokens=64),
        case("others", seconds=[1e-3], implementation="torch"),
        case("packed", seconds=[1e-3], document_lengths=[64, 64]),
    ]
    rates, records = script.attention_rows(configured("fitted_tokens=128"), cases)
    # Half of the operations a second by the one, a quarter by the other.
    assert rates == {"xla": pytest.approx(flops * (1 / 2 + 1 / 4) / 2)}
    by_name = {record["case"]: record for record in records}
    assert set(by_name) == {"fast", "slow", "short"}
    assert by_name["fast"]["error"] == pytest.approx(1 / 3)
    assert by_name["slow"]["error"] == pytest.approx(-1 / 3)
    assert [by_name[name]["fitted"] for name in ("fast", "slow", "short")] == [True, True, False]
    with pytest.raises(ValueError, match="no causal case of 7 tokens with the local block xla"):
        script.attention_rows(configured("fitted_tokens=7"), cases)


def test_each_local_block_has_a_rate_of_its_own(script, configured):
    cases = [
        case("here", seconds=[1.0], local="native_cpu"),
        case("short here", seconds=[1.0], local="native_cpu", tokens=64),
        case("anywhere", seconds=[4.0]),
    ]
    rates, records = script.attention_rows(configured("fitted_tokens=128"), cases)
    assert rates["native_cpu"] == pytest.approx(4 * rates["xla"])
    assert [record["local_block"] for record in records] == ["native_cpu", "native_cpu", "xla"]
    # A quarter of the work took as long.
    assert [record["error"] for record in records] == pytest.approx([0, 64 * 65 / (128 * 129) - 1, 0])
    with pytest.raises(ValueError, match="no causal case of 128 tokens with the local block native_cpu"):
        script.attention_rows(configured("fitted_tokens=128"), cases[1:])


def test_the_committed_comparison_is_what_committed_figures_give(script, configured, tmp_path):
    line = script.check(configured())
    assert line.startswith("gflops_per_second_")
    for name in ("attention", "published"):
        for kind in ("csv", "md"):
            assert (tmp_path / "check" / f"{name}.{kind}").read_text() == (COMMITTED / f"{name}.{kind}").read_text()
    summary = json.loads((COMMITTED / "summary.json").read_text())
    assert f"largest_error={summary['largest_error']:.3f}" in line


def test_every_way_to_share_a_sequence_is_explained_by_one_rate():
    with (COMMITTED / "attention.csv").open(newline="") as file:
        fitted = [row for row in csv.DictReader(file) if row["fitted"] == "True"]
    # What serves without a compiler is timed beside it, in fewer ways.
    (block,) = {row["local_block"] for row in fitted if row["case"] == "ring8_zigzag"}
    fitted = [row for row in fitted if row["local_block"] == block]
    assert {row["case"] for row in fitted} == {
        "ring2_zigzag",
        "ring8_zigzag",
        "ring8_contiguous",
        "ring8_striped",
        "all_gather8",
        "ulysses4",
        "hybrid4x2",
        "single",
    }
    assert max(abs(float(row["error"])) for row in fitted) < 0.16


def test_timings_that_are_not_there_and_results_that_are(script, configured, tmp_path):
    with pytest.raises(ValueError, match=r"no timings at .*nowhere\.json; experiments/bench_kernels\.py"):
        script.check(configured("timings=nowhere.json"))
    (tmp_path / "check").mkdir()
    (tmp_path / "check" / "published.csv").touch()
    with pytest.raises(FileExistsError, match="overwrite"):
        script.check(configured())
