"""The kernel benchmark: a small one in earnest, and its bookkeeping with made-up clocks."""

import importlib
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels import Mask, reference_attention
from ring_rl.kernels.local.native_build import NativeBuildError, register
from ring_rl.kernels.mask import visible

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "tokens.short=64",
    "tokens.long=128",
    "tokens.longest=128",
    "window=16",
    "packed_documents=4",
    "at_least_seconds=0",
    "platforms.cpu.gemm_size=64",
    "platforms.cpu.heads=2",
    "platforms.cpu.head_dim=8",
]
RATIOS = (
    "ring8_vs_ringattention",
    "ring8_vs_torch",
    "ring2_vs_torch",
    "block_vs_torch",
    "window_vs_full",
    "packed_vs_full",
)


@pytest.fixture
def scripts(monkeypatch):
    """`scripts(name)` imports a script of experiments/ or one beside the workers."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "experiments" / "kernel_baselines"))
    monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
    return importlib.import_module


@pytest.fixture
def bench(scripts, tmp_path):
    """The script, and a function that calls it on a composed configuration."""
    module = scripts("bench_kernels")

    def run(*overrides):
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            cfg = compose("bench_kernels", overrides=[f"output={tmp_path}", "platform=cpu", *TINY, *overrides])
        module.main.__wrapped__(cfg)
        return json.loads((tmp_path / "cpu" / "results.json").read_text())

    return module, run


class FakeWorkers:
    """Answers at once; every case of an implementation takes `seconds[implementation]`."""

    platform = "cpu"
    hello = {"device": "a made-up machine", "cores": 2}  # noqa: RUF012
    seconds = {"ring_rl": 1.0, "ringattention": 3.0, "torch": 0.5, "jax": 9.0}  # noqa: RUF012

    def __init__(self, platform, *, missing=(), wrong=(), interrupt_at=None):
        self.missing, self.wrong, self.interrupt_at = missing, wrong, interrupt_at
        self.asked, self.closed = [], False

    def get(self, implementation, devices):
        if implementation in self.missing:
            raise ValueError(f"{implementation} is not installed; pip install -e '.[benchmarks]' brings it")
        return FakeWorker(self, implementation, devices)

    def versions(self):
        return {"jax": "0"}

    def close(self):
        self.closed = True


class FakeWorker:
    def __init__(self, workers, implementation, devices):
        self.workers, self.implementation, self.devices = workers, implementation, devices

    def ask(self, command, **arguments):
        workers = self.workers
        name = arguments.get("name") or arguments.get("case", {}).get("name")
        workers.asked.append((command, name, self.devices))
        if len(workers.asked) == workers.interrupt_at:
            raise KeyboardInterrupt
        if command == "prepare":
            error = math.nan if name in workers.wrong else 1e-6
            return {"temporary_bytes": 2**20, "local": "xla", "errors": {"out": error, "dq": 1e-7}}
        if command == "gemm":
            return {"flops_per_second": 2e9 if self.implementation == "torch" else 1e9}
        # The last measurement of three is far off: a median does not see it.
        measured = sum(1 for asked in workers.asked if asked[:2] == ("measure", name))
        seconds = workers.seconds[self.implementation] * (50 if measured == 3 else 1)
        return {"forward": seconds / 3, "forward_backward": seconds}


@pytest.fixture
def fake(bench, monkeypatch):
    """As `bench`, with made-up workers, whose options are the keywords; also gives the workers."""
    module, run = bench
    made = []

    def call(*overrides, **options):
        def make(platform):
            made.append(FakeWorkers(platform, **options))
            return made[-1]

        monkeypatch.setattr(module, "Workers", make)
        return run(*overrides)

    return call, made


def ratios_of(line):
    return {name: float(value) for name, value in (pair.split("=") for pair in line.split())}


def what_auto_is_here():
    try:
        register()
    except NativeBuildError:
        return "xla"
    return "native_cpu"


def test_a_small_benchmark_measures_checks_and_reports(bench, monkeypatch, capsys, tmp_path, refused):
    _, run = bench
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find_spec(name, *a))
    cases = "cases=[ring2_zigzag,single_short_xla,jax_xla_short,torch]"
    overrides = [cases, "rounds=2", "definitions.ring2_zigzag.mask=packed"]
    results = run(*overrides)

    ours, in_xla, jax_nn, torch = results["cases"]
    assert (ours["local"], in_xla["local"]) == (what_auto_is_here(), "xla")
    assert ours["temporary_bytes"] > 0
    for case in (ours, in_xla, jax_nn):
        assert len(case["forward_seconds"]) == len(case["forward_backward_seconds"]) == 2
        assert min(case["forward_backward_seconds"]) > 0
        assert max(case["errors"].values()) < 1e-5
    lengths = np.array(ours["document_lengths"])
    assert lengths.sum() == ours["tokens"] == 128
    assert ours["pairs"] == np.sum(lengths * (lengths + 1) // 2)
    assert jax_nn["pairs"] == 64 * 65 // 2
    assert "torch is not installed; pip install" in torch["failure"]
    assert len(results["gemm_flops_per_second"]["jax"]) == 2
    assert results["gemm_flops_per_second"]["torch"] == []
    assert results["rounds"] == 2
    assert {"ring_rl", "jax"} <= set(results["versions"])

    printed = capsys.readouterr().out.strip().splitlines()
    assert "torch: torch is not installed; pip install -e '.[benchmarks]' brings it" in printed
    assert re.fullmatch(" ".join(rf"{name}=nan" for name in RATIOS), printed[-1])
    assert (tmp_path / "cpu" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "holds results.json, table.md, speed.png already" in refused(run, *overrides)


def test_ratios_are_of_medians_and_of_the_faster_variant(fake, capsys):
    call, made = fake
    results = call("rounds=3")
    assert ratios_of(capsys.readouterr().out.strip().splitlines()[-1]) == {
        "ring8_vs_ringattention": 3.0,
        "ring8_vs_torch": 0.5,
        "ring2_vs_torch": 0.5,
        "block_vs_torch": 0.5,
        "window_vs_full": 1.0,
        "packed_vs_full": 1.0,
    }
    assert list(results["ratios"]) == list(RATIOS)
    assert made[0].closed


def test_every_round_asks_every_case_once_and_in_one_order(fake):
    call, made = fake
    call("rounds=2", "cases=[ring8_zigzag,torch,hybrid4x2]")
    prepared, *measured = [made[0].asked[i : i + 3] for i in (0, 5, 10)]
    assert prepared == [("prepare", "ring8_zigzag", 8), ("prepare", "torch", 1), ("prepare", "hybrid4x2", 8)]
    assert measured == [[("measure", *rest) for _, *rest in prepared]] * 2


def test_useful_work_and_fraction_of_the_peak(fake, tmp_path):
    call, _ = fake
    case = call("cases=[ring8_zigzag]", "rounds=1")["cases"][0]
    S, D, H = 128, 8, 2
    # 7 S² D H for long causal sequences; a query also sees itself.
    assert case["useful_flops_per_second"] == pytest.approx(7 * S * (S + 1) * D * H)
    row = (tmp_path / "cpu" / "table.md").read_text().splitlines()[2].strip("| ").split(" | ")
    assert row[0] == "ring8_zigzag"
    assert row[9:12] == ["0.333", "1", f"{7 * S * (S + 1) * D * H / 1e9:.1f}"]
    assert row[12] == f"{7 * S * (S + 1) * D * H / 2e9:.0%}"


def test_without_the_other_libraries_their_ratios_are_nan(fake, capsys):
    call, _ = fake
    results = call("rounds=1", missing=("torch", "ringattention"))
    ratios = ratios_of(capsys.readouterr().out.strip().splitlines()[-1])
    assert [name for name, value in ratios.items() if math.isnan(value)] == list(RATIOS[:4])
    assert results["ratios"]["ring8_vs_torch"] is None


def test_a_wrong_result_of_ours_fails_the_run(fake, refused):
    call, _ = fake
    complaint = refused(call, "rounds=1", "cases=[ring8_zigzag,single]", wrong=("single",))
    assert "ring_rl's own single did not run or is wrong" in complaint


def test_a_wrong_result_of_another_library_is_told(fake, capsys):
    call, _ = fake
    call("rounds=1", "cases=[ring8_zigzag,torch]", wrong=("torch",))
    assert "torch: error nan is above the tolerance 1.0e-04" in capsys.readouterr().out


@pytest.mark.parametrize(("interrupt_at", "rounds"), [(9, 1), (11, 2)])
def test_ctrl_c_keeps_complete_rounds(fake, tmp_path, capsys, interrupt_at, rounds):
    call, made = fake
    with pytest.raises(SystemExit) as exit_info:
        call("rounds=3", "cases=[ring8_zigzag,torch]", interrupt_at=interrupt_at)
    assert exit_info.value.code == 130
    assert f"holds the {rounds} rounds" in capsys.readouterr().err
    results = json.loads((tmp_path / "cpu" / "results.json").read_text())
    assert [len(case["forward_backward_seconds"]) for case in results["cases"]] == [rounds, rounds]
    assert [len(speeds) for speeds in results["gemm_flops_per_second"].values()] == [rounds, rounds]
    assert made[0].closed


def test_ctrl_c_before_the_first_round_writes_nothing(fake, tmp_path, capsys):
    call, _ = fake
    with pytest.raises(SystemExit):
        call("cases=[ring8_zigzag,torch]", interrupt_at=4)
    assert "nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "cpu").exists()


def test_no_round_begins_after_the_time_limit(fake):
    call, _ = fake
    assert call("rounds=3", "cases=[ring8_zigzag]", "time_limit_seconds=0")["rounds"] == 1


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("cases=[ring9]", "unknown case 'ring9'; the cases there are ring8_zigzag, "),
        ("cases=[]", "cases must name at least one case"),
        ("rounds=0", "rounds must be at least 1, got 0"),
        ("packed_documents=65", "packed_documents must be between 1 and the 64 tokens, got 65"),
    ],
)
def test_bad_configurations_are_refused_before_work(fake, refused, override, complaint):
    call, made = fake
    assert complaint in refused(call, override)
    assert not made


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_cases_and_ratios_of_a_platform_belong_together(bench, platform):
    module, _ = bench
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        cfg = compose("bench_kernels")
    config = module.from_mapping(module.BenchmarkConfig, module.resolve(cfg))
    machine = config.platforms[platform]
    for ratio in machine.ratios.values():
        assert {*ratio.seconds_of, *ratio.over} <= set(machine.cases)
    for name in machine.cases:
        module.resolve_case(config, name, platform)
    if platform == "cpu":
        assert tuple(machine.ratios) == tuple(RATIOS)


@given(tokens=st.integers(1, 300), data=st.data(), lengths=st.sampled_from(["random", "equal"]))
def test_documents_fill_the_sequence(tokens, data, lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "experiments"))
        module = importlib.import_module("bench_kernels")
    count = data.draw(st.integers(1, tokens))

    class Config:
        packed_documents, document_lengths, seed = count, lengths, 0

    found = module.document_lengths(Config, tokens)
    assert len(found) == count
    assert sum(found) == tokens
    assert min(found) >= 1
    if lengths == "equal":
        assert max(found) - min(found) <= 1


def make_case(worker, **changes):
    fields = {
        "name": "case",
        "platform": "cpu",
        "strategy": "ring",
        "layout": "zigzag",
        "local": "xla",
        "ring_size": 1,
        "ulysses_size": 1,
        "block_size": None,
        "batch": 2,
        "tokens": 64,
        "heads": 2,
        "head_dim": 8,
        "dtype": "float32",
        "window": None,
        "document_lengths": None,
        "seed": 0,
    }
    return worker.Case(**{**fields, **changes})


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"document_lengths": (3, 58, 2, 1)}])
@pytest.mark.parametrize("spoilt", [None, "out", "dq", "dk", "dv"])
def test_the_check_knows_right_from_wrong(scripts, changes, spoilt):
    """Against dense attention, differentiated by jax."""
    worker = scripts("benchmark_worker")
    case = make_case(worker, **changes)
    inputs = worker.make_inputs(case)
    ids = worker.segment_ids(case)
    positions = np.arange(case.tokens)
    shown = visible(Mask(causal=True, window=case.window), positions, positions)
    if ids is not None:
        shown &= ids[0][:, None] == ids[0]

    def dense(q, k, v):
        scores = np.where(shown, 0, -np.inf) + jax.numpy.einsum("bthd,bshd->bhts", q, k) / np.sqrt(case.head_dim)
        return jax.numpy.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    out, pull_back = jax.vjp(dense, *inputs[:3])
    results = worker.Results(*map(np.array, (out, *pull_back(inputs.d_out))))
    if spoilt is not None:
        getattr(results, spoilt)[:, -3] += 0.1
    errors = worker.sampled_errors(case, inputs, results)
    assert [name for name, error in errors.items() if error > 1e-5] == ([] if spoilt is None else [spoilt])


def test_inputs_are_the_same_in_every_process_and_rounded(scripts):
    worker = scripts("benchmark_worker")
    in_float32, in_bfloat16 = (worker.make_inputs(make_case(worker, dtype=d)) for d in ("float32", "bfloat16"))
    assert in_float32.q.dtype == np.float32
    np.testing.assert_array_equal(in_float32.v, worker.make_inputs(make_case(worker)).v)
    np.testing.assert_array_equal(in_bfloat16.v, in_float32.v.astype(in_bfloat16.v.dtype))
    assert in_bfloat16.v.dtype == jax.numpy.bfloat16
    assert not np.array_equal(in_float32.q, in_float32.k)


def test_a_median_of_repeated_calls(scripts, monkeypatch):
    """Calls of 1, 5 and 1 s: three are needed to fill 6 s, and their median is 1 s."""
    worker = scripts("benchmark_worker")
    now, durations = [0.0], iter([1.0, 5.0, 1.0, 1.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(durations)

    assert worker.seconds_per_call(call, lambda _: None, at_least=6.5, in_flight=1) == 1.0
    assert list(durations) == [1.0]


@pytest.mark.parametrize("axes", [{"ring": 16}, {"ring": 4, "ulysses": 4}])
def test_a_ring_larger_than_the_machine_is_virtual(scripts, axes):
    """16 devices where there are 8: attention over gathered keys, each device knowing its place."""
    worker, jax_worker = scripts("benchmark_worker"), scripts("jax_worker")
    case = make_case(worker)

    def attend(q, k, v, ids):
        assert ids is None
        index, length = 0, q.shape[1]
        for name in axes:
            index = index * jax.lax.axis_size(name) + jax.lax.axis_index(name)
        for name in reversed(axes):
            k, v = (jax.lax.all_gather(x, name, axis=1, tiled=True) for x in (k, v))
        return reference_attention(
            q,
            k,
            v,
            mask=Mask(causal=True),
            query_positions=index * length + np.arange(length),
            key_positions=np.arange(case.tokens),
        )[0]

    inputs = worker.make_inputs(case)
    prepared = jax_worker.prepare(case, inputs, attend, axes=axes, order=None, check_vma=True)
    assert max(worker.sampled_errors(case, inputs, prepared.results()).values()) < 1e-5


def test_a_process_that_dies_says_why_and_an_error_does_not_end_it(scripts, monkeypatch):
    processes = scripts("kernel_baselines.processes")
    worker = processes.Worker("jax", devices=1, platform="cpu")
    try:
        assert worker.hello["platform"] == "cpu"
        with pytest.raises(ValueError, match="unknown command 'dance'"):
            worker.ask("dance")
        assert worker.ask("gemm", size=8, dtype="float32", at_least=0.0)["flops_per_second"] > 0
    finally:
        worker.close()
    monkeypatch.setenv("JAX_ENABLE_X64", "no such value")
    with pytest.raises(ValueError, match=r"process ended with 1: .*no such value"):
        processes.Worker("jax", devices=1, platform="cpu")


def test_the_environment_of_a_process_replaces_the_number_of_devices_only(scripts, monkeypatch):
    processes = scripts("kernel_baselines.processes")
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2")
    environment = processes._environment(3, "cpu")
    assert environment["XLA_FLAGS"].split() == [
        "--xla_a=1",
        "--xla_b=2",
        "--xla_force_host_platform_device_count=3",
    ]
    assert environment["JAX_PLATFORMS"] == "cpu"
