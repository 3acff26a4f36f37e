"""Memory as ring and context grow together: compiled for a tiny model on CPU devices, and how the script goes on."""

import csv
import json

import pytest

from ring_rl.planning.compile_process import CompilationFailedError
from ring_rl.planning.compiled_step import CompiledMemory, compile_memory
from ring_rl.planning.topology import devices_of

SMALL = [
    "machines=[gpu:2xany-1GB,gpu:4xany-1GB]",
    "tokens_a_device=128",
    "settings.vocabulary_size=64",
    "settings.feed_forward_block=64",
    "settings.loss_block=64",
    "transformer.layers=1",
    "transformer.width=16",
    "transformer.query_heads=2",
    "transformer.key_value_heads=2",
    "transformer.head_dim=8",
    "transformer.feed_forward_width=32",
    "transformer.attention_block_size=128",
]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("memory_by_slice")


@pytest.fixture
def arguments(tmp_path):
    return ("memory_by_slice", f"output={tmp_path / 'table'}", f"probes={tmp_path / 'probes.jsonl'}", *SMALL)


@pytest.fixture
def made_up(script, monkeypatch):
    """1000 bytes beside a state of 800 that devices share; `asked` lists devices, `failing` those that fail."""

    class Compilers(script.CompileProcesses):
        asked, failing = [], set()

        def compile(self, request, machine):
            self.asked.append(machine.devices)
            if machine.devices in self.failing:
                raise CompilationFailedError("a compiler ended with exit code -9: it was killed")
            state = 800 // machine.devices
            return CompiledMemory(
                peak_bytes=1000 + state,
                wanted_bytes=None,
                limit_bytes=None,
                state_bytes=state,
                attention_block="auto",
                lower_seconds=10.0,
                compile_seconds=50.0,
            )

    monkeypatch.setattr(script, "CompileProcesses", Compilers)
    return Compilers


def last_line(capsys):
    return capsys.readouterr().out.strip().splitlines()[-1]


@pytest.fixture
def in_this_process(script, monkeypatch):
    """Real compilations, spared the start of a process each."""

    class Compilers(script.CompileProcesses):
        def compile(self, request, machine):
            return compile_memory(request, devices_of(machine))

    monkeypatch.setattr(script, "CompileProcesses", Compilers)


def test_a_ring_of_twice_the_devices_and_tokens_needs_no_more(
    call_script, in_this_process, arguments, capsys, tmp_path
):
    call_script(*arguments)
    figures = dict(figure.split("=") for figure in last_line(capsys).split())
    assert figures["context_growth"] == "2"
    # A larger ring has buffers for one more shard of keys and values in flight.
    assert float(figures["growth_without_state"]) < 1.3
    with (tmp_path / "table" / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["context"]) for row in rows] == [256, 512]
    # Weights and moments are shared by the ring; what does not divide is on every device.
    assert int(rows[1]["state_bytes"]) < 0.7 * int(rows[0]["state_bytes"])


def test_it_goes_on_where_it_was_and_compiles_nothing_twice(call_script, made_up, arguments, capsys, refused, tmp_path):
    call_script(*arguments, "dry_run=true")
    assert "2 of 2 machines are left: about 2 min, by expected_seconds" in capsys.readouterr().out
    assert not made_up.asked
    assert not (tmp_path / "table").exists()

    made_up.failing = {4}
    with pytest.raises((SystemExit, CompilationFailedError)):
        call_script(*arguments)
    assert made_up.asked == [2, 4]
    capsys.readouterr()

    made_up.failing = set()
    call_script(*arguments)
    shown = capsys.readouterr().out
    assert "1 of 2 machines are left: about 1 min, by those known" in shown
    assert made_up.asked == [2, 4, 4]
    assert shown.strip().splitlines()[-1] == "context_growth=2 growth=1.167 growth_without_state=1.000"
    assert "| gpu:4xany-1GB | 4 | 512 | 0.000 | 0.000 | 1 min |" in (tmp_path / "table" / "table.md").read_text()
    assert (tmp_path / "table" / "memory.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "table" / "summary.json").read_text())
    assert summary["growth"] == pytest.approx(1400 / 1200)

    assert "holds memory.csv" in refused(call_script, *arguments)
    call_script(*arguments, "overwrite=true")
    assert "all 2 machines are known" in capsys.readouterr().out
    assert made_up.asked == [2, 4, 4]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("machines=[gpu:4xany-1GB,gpu:2xany-1GB]", "machines must be at least two, smallest first"),
        ("machines=[v5e-8,v5e-24]", "unknown TPU slice 'v5e-24'"),
        ("machines=[gpu:2xany-1GB,gpu:3xany-1GB]", "transformer.width=16 is not a multiple of 3 devices"),
        ("variant.sequence_devices=1", "only then does context grow with the devices"),
        ("processes=0", "processes must be at least 1"),
    ],
)
def test_refusals(call_script, refused, arguments, override, complaint, tmp_path):
    assert complaint in refused(call_script, *arguments, override)
    assert not (tmp_path / "table").exists()
