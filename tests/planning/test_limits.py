"""A table searched with a made-up compiler: what is asked, what is not, what is said of it."""

import csv
import dataclasses
import json
import re
import threading
import time

import pytest

from ring_rl.planning.attentions import AttentionVariant, StepSettings
from ring_rl.planning.compile_process import CompilationFailedError, CompileProcesses
from ring_rl.planning.forecast import Forecast, duration
from ring_rl.planning.limits import LimitsConfig, PublishedContexts, Row, plan_of, report_problems, search_cells
from ring_rl.planning.limits_report import headline, ratio, table_rows, write_limits
from ring_rl.planning.probe_cache import CachedProbe, open_probe_cache
from small_models import small_transformer

GB = 10**9
SLICE, NODE = "v5e-8", "gpu:2xA100-80GB"


@pytest.fixture
def config(ring_request, tmp_path):
    def variant(label, strategy, sequence_devices, ulysses_size=1, tensor_devices=1):
        return AttentionVariant(
            label=label,
            strategy=strategy,
            sequence_devices=sequence_devices,
            tensor_devices=tensor_devices,
            ulysses_size=ulysses_size,
            saved_activations="none",
            feed_forward_blockwise=True,
        )

    return LimitsConfig(
        name="test",
        models={"small": small_transformer()},
        rows=(Row(model="small", machine=SLICE), Row(model="small", machine=NODE)),
        columns=("vanilla", "blockwise", "ring"),
        attentions={
            "vanilla": variant("vanilla", "dense", 1),
            "blockwise": variant("blockwise", "ring", 1),
            "ring": variant("ring", "ring", None),
            "ulysses": variant("Ulysses", "ulysses", None),
            "hybrid": variant("hybrid", "hybrid", None, ulysses_size=3),
            "groups": variant("groups", "ring", 8, tensor_devices=2),
        },
        settings=StepSettings(
            layout="zigzag",
            vocabulary_size=64,
            tied_embedding=False,
            feed_forward_block=256,
            loss_block=256,
            attention_block="auto",
            heads_at_once=None,
            tpu_dtype="bfloat16",
            gpu_dtype="float32",
            optimizer=ring_request.optimizer,
        ),
        quantum=1024,
        largest_tokens_a_device=2**20,
        significant_bits=4,
        expected_seconds=10.0,
        expected_gpu_seconds=10.0,
        expectation="a guess",
        processes=2,
        probes=tmp_path / "probes.jsonl",
        output=tmp_path / "output",
        published=PublishedContexts(
            source="a paper", differs=(), contexts={SLICE: {"small": {"blockwise": 16, "ring": 512}}}
        ),
        dry_run=False,
        partial=False,
        overwrite=False,
    )


class MadeUpCompilers(CompileProcesses):
    """1 GB and 0.1 GB a thousand tokens; with dense attention as much a million pairs. Counts what it is asked."""

    def __init__(self, compiled, failing=(), slow=0.0):
        super().__init__()
        self.asked, self._compiled, self._failing, self._slow = [], compiled, failing, slow
        self._together = threading.Lock()

    def compile(self, request, machine):
        with self._together:
            self.asked.append((machine.name, request))
        time.sleep(self._slow)
        if request.strategy in self._failing:
            raise CompilationFailedError("a bug")
        thousands = request.context / max(request.mesh.sp, 1) / 1024
        peak = int(GB + 0.1 * GB * (thousands**2 if request.strategy == "dense" else thousands))
        if peak <= machine.memory_bytes:
            return self._compiled(peak_bytes=peak)
        return self._compiled(peak_bytes=None, wanted_bytes=peak, limit_bytes=machine.memory_bytes)


@pytest.fixture
def searched(config, compiled):
    """`searched()`: results, compilers, and the forecast; what is known is kept between calls."""

    def search(config=config, **options):
        with open_probe_cache(config.probes) as cache, MadeUpCompilers(compiled, **options) as compilers:
            forecast = Forecast(
                [plan_of(config, cell) for cell in config.cells],
                cache,
                expected_seconds=config.expected_seconds,
                expected_gpu_seconds=config.expected_gpu_seconds,
            )
            said = forecast.describe(config)
            found = search_cells(
                forecast.plans,
                cache,
                compilers,
                workers=2,
                on_probe=lambda plan, length, memory: forecast.compiled(plan, memory),
                on_done=forecast.finished,
            )
            return {each.plan.cell: each for each in found}, compilers, forecast, said

    return search


def test_every_cell_ends_between_what_fits_and_what_does_not(config, searched):
    results, compilers, _, _ = searched()
    found = {(cell.row.machine, cell.attention): each for cell, each in results.items()}
    # (15.75 GiB - 1 GB) / 0.1 GB = 159 thousand on a grid of 144, 160; its root is 12.6; 790 on one of 768, 832.
    assert found[SLICE, "blockwise"].context == 144 * 1024
    assert found[SLICE, "ring"].context == 8 * 144 * 1024
    assert found[SLICE, "vanilla"].context == 12 * 1024
    assert found[NODE, "ring"].context == 2 * 768 * 1024
    for each in results.values():
        assert each.final
        grid = each.plan.lengths
        assert each.failing_tokens_a_device == grid[grid.index(each.tokens_a_device) + 1]
        assert {each.tokens_a_device, each.failing_tokens_a_device} <= set(each.known)
        assert each.peak_bytes <= each.plan.machine.memory_bytes
        assert len(each.known) <= 5
    assert len(compilers.asked) == sum(len(each.known) for each in results.values())


def test_nothing_is_compiled_twice(config, searched):
    first, _, _, said = searched()
    assert "6 of 6 cells are left, about 21 compilations in 2 processes: about 1 min, by a guess" in said
    again, compilers, _, said = searched()
    assert compilers.asked == []
    assert said.startswith("all 6 cells are known from")
    assert {cell: each.context for cell, each in again.items()} == {cell: each.context for cell, each in first.items()}


def test_gpus_that_differ_in_memory_alone_share_what_is_compiled(config, searched):
    machines = ("gpu:2xA100-80GB", "gpu:2xH100-80GB")
    rows = tuple(Row(model="small", machine=machine) for machine in machines)
    results, compilers, _, _ = searched(dataclasses.replace(config, rows=rows, columns=("ring",)), slow=0.05)
    asked = [request for _, request in compilers.asked]
    assert len(set(asked)) == len(asked)
    assert len({each.context for each in results.values()}) == 1


def test_a_search_goes_on_where_it_was_killed(config, searched):
    whole, *_ = searched()
    lines = config.probes.read_text().splitlines(keepends=True)
    config.probes.write_text("".join(lines[:9]) + lines[9][:40])
    again, rest, _, said = searched()
    assert {cell: each.context for cell, each in again.items()} == {cell: each.context for cell, each in whole.items()}
    assert len(rest.asked) == len(lines) - 9
    assert "by timed ones; 9 known" in said


def test_a_compiler_that_fails_ends_its_own_cell_and_is_asked_again_next_time(config, searched):
    results, _, forecast, _ = searched(failing=("dense",))
    by_name = {(cell.row.machine, cell.attention): each for cell, each in results.items()}
    assert by_name[SLICE, "vanilla"].failure == "a bug"
    assert by_name[SLICE, "vanilla"].context is None
    assert by_name[SLICE, "ring"].context == 8 * 144 * 1024
    assert forecast.remaining == 0
    assert [line[2] for line in table_rows(config, results)[1:]] == ["failed", "failed"]
    _, compilers, _, _ = searched()
    assert {request.strategy for _, request in compilers.asked} == {"dense"}


def test_the_forecast_counts_down_and_learns_from_timed_compilations(config, searched):
    _, compilers, forecast, _ = searched()
    assert forecast.done == len(compilers.asked)
    assert (forecast.remaining, forecast.total) == (0, forecast.done)
    assert forecast.seconds() == 0
    # Of the node all is forgotten, and what a slice took says nothing of it.
    lines = [line for line in config.probes.read_text().splitlines() if '"machine": "cpu' not in line]
    config.probes.write_text("\n".join(lines) + "\n")
    with open_probe_cache(config.probes) as cache:
        plans = [plan_of(config, cell) for cell in config.cells]
        forecast = Forecast(plans, cache, expected_seconds=20.0, expected_gpu_seconds=10.0)
    assert (forecast.cells_left, forecast.remaining, forecast.seconds()) == (3, 9, 90.0)


def test_refusals_take_seconds_and_do_not_make_what_fits_look_quick(config, compiled):
    config = dataclasses.replace(config, rows=config.rows[:1], columns=("ring",))
    plan = plan_of(config, config.cells[0])
    with open_probe_cache(config.probes) as cache:
        forecast = Forecast([plan], cache, expected_seconds=100.0, expected_gpu_seconds=1.0)
    # Two compiled, two refused.
    assert (forecast.remaining, forecast.seconds()) == (4, 210.0)
    refusal = {"peak_bytes": None, "lower_seconds": 1.0, "compile_seconds": 3.0}
    forecast.compiled(plan, compiled(**refusal))
    assert (forecast.remaining, forecast.seconds()) == (3, 204.0)
    forecast.compiled(plan, compiled(**refusal))
    assert (forecast.remaining, forecast.seconds()) == (2, 200.0)
    forecast.compiled(plan, compiled(peak_bytes=1, lower_seconds=10.0, compile_seconds=40.0))
    assert (forecast.remaining, forecast.seconds()) == (1, 50.0)
    forecast.compiled(plan, compiled(peak_bytes=1, lower_seconds=10.0, compile_seconds=40.0))
    assert (forecast.remaining, forecast.seconds()) == (1, 50.0)


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (89, "1 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min")])
def test_durations_are_read_by_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("row", "model", "reason", "remedy"),
    [
        ((SLICE, "ulysses"), {}, "2", "the smallest that would do: v5e-1"),
        (
            ("v5e-32", "ulysses"),
            {"query_heads": 8},
            "8",
            "the smallest that would do: v5e-1, the largest: v5e-8",
        ),
        ((SLICE, "hybrid"), {}, "ulysses_size=3 does not divide sp=8", "no slice of v5e would do"),
        ((SLICE, "groups"), {}, "8 devices do not divide into groups of 16", "the smallest that would do: v5e-16"),
        (("v5e-64", "groups"), {"query_heads": 3}, "tp=2 does not divide query_heads=3", "no slice of v5e would do"),
        (
            (SLICE, "ring"),
            {"width": 8192, "layers": 80, "feed_forward_width": 22016, "query_heads": 64, "head_dim": 128},
            r"parameters and moments alone take 97\.1 GB on each of 8 devices, which have 16\.9",
            "the smallest that would do: v5e-64",
        ),
        (
            ("gpu:2xA100-80GB", "ring"),
            {"width": 8192, "layers": 80, "feed_forward_width": 22016, "query_heads": 64, "head_dim": 128},
            "alone take",
            "the smallest that would do: 16 of these GPUs",
        ),
    ],
)
def test_what_cannot_be_is_said_before_compiling_with_the_smallest_machine_that_would_do(
    config, searched, row, model, reason, remedy
):
    machine, attention = row
    changes = model | ({"key_value_heads": model["query_heads"]} if model else {})
    impossible = dataclasses.replace(
        config,
        models={"small": small_transformer(**changes)},
        rows=(Row(model="small", machine=machine),),
        columns=(attention,),
    )
    problem = plan_of(impossible, impossible.cells[0]).problem
    assert "\n" not in problem
    assert re.search(reason, problem)
    assert problem.endswith(remedy)
    results, compilers, _, _ = searched(impossible)
    assert compilers.asked == []
    assert table_rows(impossible, results)[1][2].startswith("impossible")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"columns": ()}, "columns is empty"),
        ({"name": "../elsewhere"}, "without a slash"),
        ({"expected_seconds": -5.0}, "expected_seconds must be above 0"),
        ({"expected_gpu_seconds": float("nan")}, "expected_gpu_seconds must be above 0"),
        ({"columns": ("sparse",)}, "unknown attention 'sparse'; choose of vanilla"),
        ({"rows": (Row(model="large", machine=SLICE),)}, "unknown model 'large'; choose of small"),
        ({"columns": ("ring", "ring")}, "columns must differ, and 'ring' is there twice"),
        (
            {"rows": (Row(model="small", machine="v5e-8"), Row(model="small", machine="V5litepod-8"))},
            "rows must differ, and 'small on v5e-8' is there twice",
        ),
        ({"quantum": 3}, "even"),
        ({"processes": 0}, "at least 1"),
        ({"largest_tokens_a_device": 8}, "at least the quantum"),
    ],
)
def test_a_table_that_cannot_be_is_refused(config, changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(config, **changes)


def test_a_machine_has_one_name_however_it_is_spelt():
    assert Row(model="small", machine=" V5E-8").machine == "v5e-8"
    assert Row(model="small", machine="GPU:08xH100-SXM-80gb").machine == "gpu:8xH100-SXM-80GB"
    with pytest.raises(ValueError, match="unknown TPU slice"):
        Row(model="small", machine="v5e-9")


def test_two_columns_of_one_label_are_refused(config):
    attentions = {**config.attentions, "again": config.attentions["ring"]}
    with pytest.raises(ValueError, match="labels of columns must differ, and 'ring'"):
        dataclasses.replace(config, attentions=attentions, columns=("ring", "again"))


def test_groups_of_three_gpus_get_a_remedy_of_groups_of_three(config):
    attentions = {**config.attentions, "groups": dataclasses.replace(config.attentions["ring"], sequence_devices=3)}
    config = dataclasses.replace(
        config, attentions=attentions, columns=("groups",), rows=(Row(model="small", machine=NODE),)
    )
    problem = plan_of(config, config.cells[0]).problem
    assert problem.endswith("the smallest that would do: 3 of these GPUs")
    with pytest.raises(ValueError, match="3 of these GPUs"):
        report_problems([plan_of(config, config.cells[0])])


def test_results_name_no_folder_of_this_machine_and_no_picture_outlives_its_table(config, searched):
    results, *_ = searched()
    with open_probe_cache(config.probes) as cache:
        write_limits(config, results, cache, versions={})
        assert str(config.output.parent) not in (config.output / "summary.json").read_text()
        assert (config.output / "limits.png").exists()
        nothing = {cell: each.plan.result({}) for cell, each in results.items()}
        write_limits(config, nothing, cache, versions={})
    assert not (config.output / "limits.png").exists()


def test_a_cell_that_failed_on_its_way_says_how_far_it_was(config, searched):
    results, *_ = searched()
    cell = config.cells[2]
    lengths = results[cell].known
    short = {length: memory for length, memory in lengths.items() if memory.peak_bytes is not None}
    failed = dataclasses.replace(results[cell].plan.result(short), failure="a bug")
    assert table_rows(config, {**results, cell: failed})[1][4] == "1,152 or more, then failed (512)"


def test_the_report_says_what_was_found_beside_the_paper(config, searched):
    results, *_ = searched()
    rows = table_rows(config, results)
    assert rows == [
        ["machine", "model", "vanilla", "blockwise", "ring", "ring / blockwise"],
        [SLICE, "small", "12", "144 (16)", "1,152 (512)", "8"],
        [f"{NODE} (estimate)", "small", "28", "768", "1,536", "2"],
    ]
    assert headline(config, results) == (
        "cells=6/6 ring_at_least_paper=1/1 least_ring_to_blockwise_over_devices=1.00 longest_context=1572864"
    )
    with open_probe_cache(config.probes) as cache:
        # Of another table.
        cache.put(CachedProbe(key={"request": "another"}, memory=cache.all()[0].memory, commit="0" * 40))
        write_limits(config, results, cache, versions={"jax": "1"})
    with (config.output / "limits.csv").open() as file:
        cells = {(row["machine"], row["attention"]): row for row in csv.DictReader(file)}
    ring = cells[SLICE, "ring"]
    assert (ring["context"], ring["paper_context"], ring["devices"], ring["final"]) == (
        "1179648",
        "524288",
        "8",
        "True",
    )
    assert int(ring["peak_bytes"]) <= int(ring["memory_bytes"]) < int(ring["failing_wanted_bytes"])
    with (config.output / "probes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == sum(len(each.known) for each in results.values())
    assert (config.output / "limits.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((config.output / "summary.json").read_text())
    assert summary["headline"] == headline(config, results)
    assert summary["versions"] == {"jax": "1"}
    assert summary["commits_of_probes"]
    assert "0" * 40 not in summary["commits_of_probes"]
    assert summary["config"]["probes"] == config.probes.name


def test_a_partial_table_says_what_is_not_final(config, searched):
    searched()
    # What is left of blockwise is a length that fits, of ring one that does not.
    kept = []
    for line in config.probes.read_text().splitlines():
        record = json.loads(line)
        asked, fits = record["key"]["request"], record["memory"]["peak_bytes"] is not None
        over = asked["mesh"]["sp"] > 1
        if record["key"]["machine"] == "v5e:2x4" and asked["strategy"] == "ring" and fits != over:
            kept.append(line)
    config.probes.write_text("\n".join(kept) + "\n")
    with open_probe_cache(config.probes) as cache:
        plans = [plan_of(config, cell) for cell in config.cells]
        results = {plan.cell: plan.result(plan.known(cache)) for plan in plans}
    assert table_rows(config, results)[1][2:] == ["?", "144 or more (16)", "? (512)", ""]
    assert ratio(results, config.rows[0]) is None
    assert headline(config, results) == "cells=0/6"
