"""The benchmark of decoding: a small one in earnest, what it takes for wrong, its bookkeeping by a made-up clock."""

import csv
import importlib
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from cpp_compiler import HAS_COMPILER, NO_COMPILER
from ring_rl.kernels.local.native_cpu import NativeCpuBlock
from ring_rl.kernels.mask import CAUSAL
from ring_rl.kernels.reference import reference_attention

REPOSITORY = Path(__file__).parents[2]
FEW, MANY = 2, 20  # both sides of what models take for few new tokens
SIZES = {"batch": 2, "query_heads": 4, "key_value_heads": 2, "head_dim": 8, "slots": 96}
TINY = [
    "~shapes.agent",
    "~shapes.grouped",
    *(f"shapes.language_model.{name}={value}" for name, value in SIZES.items()),
    f"new_tokens=[1,{MANY}]",
    "filled=[1.0,0.5]",
    "at_least_seconds=0",
    "rounds=2",
]
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)


@pytest.fixture
def scripts(monkeypatch):
    """`scripts(name)` imports a script of experiments/."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
    return importlib.import_module


@pytest.fixture
def bench(scripts, tmp_path):
    """The script, and a function that calls it on a composed configuration and gives what it wrote."""
    module = scripts("bench_decoding")

    def run(*overrides):
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            cfg = compose("bench_decoding", overrides=[f"output={tmp_path}", *TINY, *overrides])
        module.main.__wrapped__(cfg)
        return json.loads((tmp_path / "cpu" / "results.json").read_text())

    return module, run


@pytest.fixture
def clock(bench, monkeypatch):
    """`run(seconds, interrupt_at=None)`: as `bench`, every call of a block taking `seconds[block]`, by turns.

    The last of three rounds is far off: a median does not see it.
    """
    module, run = bench

    def call(seconds, *overrides, interrupt_at=None):
        order, asked = ["xla_whole", "xla_tiles", "native_cpu"] * 2 + ["xla_tiles", "native_cpu"] * 2, []

        def made_up(start, wait, *, at_least, in_flight):
            wait(start())
            if len(asked) + 1 == interrupt_at:
                raise KeyboardInterrupt
            number, place = divmod(len(asked), len(order))
            asked.append(order[place])
            return seconds[order[place]] * (50 if number == 2 else 1)

        monkeypatch.setattr(module, "seconds_per_call", made_up)
        return run(*overrides)

    return call


def figures_of(printed):
    return {
        name: float(value) for name, value in (pair.split("=") for pair in printed.strip().splitlines()[-1].split())
    }


def cells(path):
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in path.read_text().splitlines()[2:]]


def test_a_small_benchmark_measures_checks_and_reports(bench, capsys, tmp_path, refused):
    _, run = bench
    results = run()
    last = figures_of(capsys.readouterr().out)
    native = ["native_cpu"] if HAS_COMPILER else []
    assert results["rounds"] == 2
    blocks = [(each["new_tokens"], each["filled"], each["block"]) for each in results["measurements"]]
    assert blocks == [
        *((1, filled, block) for filled in (1.0, 0.5) for block in ("xla_whole", "xla_tiles", *native)),
        *((MANY, filled, block) for filled in (1.0, 0.5) for block in ("xla_tiles", *native)),
    ]
    for each in results["measurements"]:
        assert len(each["seconds"]) == 2
        assert min(each["seconds"]) > 0
        assert 0 < each["error"] < 1e-5
    assert list(last) == [
        "one_token_speedup",
        "chunk_speedup",
        "one_token_speedup_least_filled",
        "chunk_speedup_least_filled",
    ]
    for name, shown in last.items():
        assert math.isnan(shown) if results[name] is None else shown == pytest.approx(results[name], abs=0.005)
        assert (results[name] is None) == (not HAS_COMPILER)
    assert {"commit", "device", "cores", "versions", "config"} <= set(results)
    assert len(cells(tmp_path / "cpu" / "table.md")) == 4
    assert (tmp_path / "cpu" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "holds results.json, decoding.csv, table.md, speed.png already" in refused(run)


@needs_compiler
def test_medians_ratios_and_what_they_make_of_the_machine(clock, tmp_path, capsys):
    results = clock({"xla_whole": 0.25, "xla_tiles": 0.5, "native_cpu": 0.125}, "rounds=3")
    # The faster of XLA's: one product where tokens are few, tiles where they are not.
    assert figures_of(capsys.readouterr().out) == {
        "one_token_speedup": 2.0,
        "chunk_speedup": 4.0,
        "one_token_speedup_least_filled": 2.0,
        "chunk_speedup_least_filled": 4.0,
    }
    assert results["measurements"][0]["seconds"] == [0.25, 0.25, 12.5]
    few_full, few_half, many_full, many_half = cells(tmp_path / "cpu" / "table.md")
    B, H, K, D, S = SIZES.values()
    assert few_full[:7] == ["language_model: 2 x 4/2 x 8, 96 slots", "1", "100%", "250", "500", "125", "2.00"]
    assert many_half[1:7] == [str(MANY), "50%", "", "500", "125", "4.00"]
    # The yardstick of few tokens is the cache that they read, that of many the products, of the fastest block.
    assert [few_half[7], few_half[8]] == [f"{2 * B * K * (S // 2) * D * 4 / 0.125 / 1e9:.3g}", ""]
    pairs = sum(S - MANY + i + 1 for i in range(MANY))
    assert [many_full[7], many_full[8]] == ["", f"{4 * B * H * D * pairs / 0.125 / 1e9:.3g}"]
    with (tmp_path / "cpu" / "decoding.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["milliseconds"]) for row in rows[:3]] == [250, 500, 125]
    assert [row["filled_slots"] for row in rows[:6:3]] == ["96", "48"]
    assert float(rows[0]["cache_gigabytes_per_second"]) == pytest.approx(2 * B * K * S * D * 4 / 0.25 / 1e9)


@needs_compiler
def test_only_one_new_token_is_called_one_and_only_many_are_a_chunk(clock, capsys):
    seconds = {"xla_whole": 0.25, "xla_tiles": 0.5, "native_cpu": 0.125}
    clock(seconds, f"new_tokens=[{FEW}]", "rounds=1")
    assert all(math.isnan(value) for value in figures_of(capsys.readouterr().out).values())


def test_without_the_block_of_a_cpu_its_figures_are_nan_and_it_is_said_why(bench, monkeypatch, capsys, tmp_path):
    _, run = bench
    monkeypatch.setattr(NativeCpuBlock, "refusal", lambda self, demand: "it needs a C++ compiler")
    results = run()
    printed = capsys.readouterr().out
    assert 'without native_cpu: decoding with local="native_cpu" cannot serve: it needs a C++ compiler' in printed
    assert all(math.isnan(value) for value in figures_of(printed).values())
    assert results["one_token_speedup"] is None
    assert {each["block"] for each in results["measurements"]} == {"xla_whole", "xla_tiles"}
    assert all(row[5:7] == ["", ""] for row in cells(tmp_path / "cpu" / "table.md"))


@pytest.mark.parametrize("spoilt", ["one key too many", "nan"])
def test_nothing_is_timed_where_a_result_is_wrong(bench, scripts, monkeypatch, refused, tmp_path, spoilt):
    _, run = bench
    cases = scripts("decoding_speed.cases")
    decode = cases.decode_attention

    def wrong(q, k, v, *, length, local, tile_size):
        right = decode(q, k, v, length=length, local="xla", tile_size=tile_size)
        if tile_size != k.shape[2]:
            return right
        return right + jnp.nan if spoilt == "nan" else decode(q, k, v, length=length + 1, local="xla")

    monkeypatch.setattr(cases, "decode_attention", wrong)
    # In a full cache there is no key too many to be read.
    complaint = refused(run, "filled=[0.5]", f"new_tokens=[{FEW}]", "rounds=1")
    assert "so nothing is timed: xla_whole on language_model, 2 new, 50% filled: " in complaint
    assert "xla_tiles" not in complaint
    assert not (tmp_path / "cpu").exists()


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(0, 20),
    new=st.integers(1, 6),
    heads=st.sampled_from([(2, 2), (6, 2), (3, 1)]),
    data=st.data(),
)
def test_the_exact_rows_are_the_specifications(seed, length, new, heads, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "experiments"))
        cases = importlib.import_module("decoding_speed.cases")
    H, K = heads
    generator = np.random.default_rng(seed)
    q = generator.standard_normal((2, new, H, 4), dtype=np.float32)
    # Slots after the new tokens hold what nobody may read.
    k, v = (generator.standard_normal((2, K, length + new + 3, 4), dtype=np.float32) for _ in range(2))
    tokens = np.unique(data.draw(st.lists(st.integers(0, new - 1), min_size=1)))
    k_read, v_read = (jnp.swapaxes(jnp.asarray(x[:, :, : length + new]), 1, 2) for x in (k, v))
    positions = np.arange(length + new)
    expected = reference_attention(
        jnp.asarray(q), k_read, v_read, mask=CAUSAL, query_positions=positions[length:], key_positions=positions
    )[0]
    found = cases.exact_rows(q, k, v, length=length, tokens=tokens)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.asarray(expected)[:, tokens], atol=1e-5)


def test_the_committed_table_follows_from_its_measurements(bench):
    module, _ = bench
    folder = REPOSITORY / "experiments" / "results" / "decoding" / "cpu"
    results = json.loads((folder / "results.json").read_text())
    config = module.from_mapping(module.DecodingBenchmarkConfig, results["config"])
    measurements = [module.Measurement(**fields) for fields in results["measurements"]]
    itemsize = jnp.dtype(results["dtype"]).itemsize
    table = module.markdown_table(module.table_rows(config.shapes, measurements, itemsize))
    assert table == (folder / "table.md").read_text()
    assert module.speedups(measurements) == {name: results[name] for name in module.speedups(measurements)}
    assert {len(each.seconds) for each in measurements} == {results["rounds"]}
    assert results["rounds"] >= 3
    assert all(each.error <= config.tolerance[results["dtype"]] for each in measurements)
    assert results["commit"]


@needs_compiler
@pytest.mark.parametrize(("interrupt_at", "rounds"), [(12, 1), (25, 2)])
def test_ctrl_c_keeps_complete_rounds(clock, tmp_path, capsys, interrupt_at, rounds):
    seconds = {"xla_whole": 0.25, "xla_tiles": 0.5, "native_cpu": 0.125}
    with pytest.raises(SystemExit) as exit_info:
        clock(seconds, "rounds=3", interrupt_at=interrupt_at)
    assert exit_info.value.code == 130
    assert f"holds the {rounds} rounds" in capsys.readouterr().err
    results = json.loads((tmp_path / "cpu" / "results.json").read_text())
    assert {len(each["seconds"]) for each in results["measurements"]} == {rounds}


@needs_compiler
def test_ctrl_c_before_the_first_round_writes_nothing(clock, tmp_path, capsys):
    with pytest.raises(SystemExit):
        clock({"xla_whole": 0.25}, interrupt_at=2)
    assert "nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "cpu").exists()


def test_no_round_begins_after_the_time_limit(bench):
    _, run = bench
    assert run("rounds=3", "time_limit_seconds=0", f"new_tokens=[{FEW}]")["rounds"] == 1


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("rounds=0", "rounds must be at least 1, got 0"),
        ("checked_tokens=1", "checked_tokens must be at least 2, got 1"),
        ("new_tokens=[]", "new_tokens must have at least one entry"),
        ("new_tokens=[4,0]", "new_tokens must be at least 1, got 0"),
        ("new_tokens=[4,4]", "new_tokens must differ from one another, got 4, 4"),
        ("filled=[0.5,1.5]", "filled must be shares above 0 and at most 1, got 0.5, 1.5"),
        ("new_tokens=[49]", "49 new tokens do not fit into the 48 slots of language_model that are filled at 0.5"),
        ("shapes.language_model.slots=0", "shapes.language_model: slots must be at least 1, got 0"),
        ("shapes.language_model.key_value_heads=3", "4 query heads cannot share 3 key-value heads; use a multiple"),
        ("~tolerance.float32", "tolerance has no value for float32, which dtype names; add tolerance.float32"),
        ("~dtype.cpu", "dtype has no value for the platform 'cpu'; add dtype.cpu"),
    ],
)
def test_bad_configurations_are_refused_before_work(bench, refused, tmp_path, override, complaint):
    _, run = bench
    assert complaint in refused(run, override)
    assert not (tmp_path / "cpu").exists()
