"""What of the overlap check needs no libtpu: its configuration, its tables and its picture."""

import csv
import importlib.util
import json

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.kernels.local.pallas_tpu import PallasTpuBlock
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.schedule import Schedule
from ring_rl.planning import topology


@pytest.fixture(scope="module")
def script(pytestconfig):
    path = pytestconfig.rootpath / "experiments" / "check_overlap.py"
    spec = importlib.util.spec_from_file_location("check_overlap", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config_of(script, pytestconfig, tmp_path):
    def compose_with(*overrides):
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            composed = compose("check_overlap", overrides=[f"output={tmp_path / 'overlap'}", *overrides])
        return from_mapping(script.OverlapConfig, resolve(composed))

    return compose_with


HIDDEN = """HloModule jit_ring, is_scheduled=true
ENTRY %main (x: bf16[2,8], y: f32[8,8]) -> f32[8,8] {
  %x = bf16[2,8] parameter(0)
  %y = f32[8,8] parameter(1)
  %start = (bf16[2,8]{1,0}, bf16[2,8]{1,0}) collective-permute-start(%x), channel_id=1
  %kernel = f32[8,8]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  %done = bf16[2,8]{1,0} collective-permute-done(%start)
}
"""
EXPOSED = HIDDEN.replace("tpu_custom_call", "ConcatBitcast")


def _program(script, text, direction="forward"):
    schedule = Schedule.parse(text)
    return script.Program("v5e:2x4", direction, schedule, schedule.permutes(), 1024)


def test_the_default_is_a_ring_of_eight_with_the_tpu_s_own_kernels(script, config_of):
    config = config_of()
    assert config.topologies == ("v5e:2x4", "v5p:2x2x2")
    assert isinstance(config.block(), PallasTpuBlock)
    assert isinstance(config_of("local=xla").block(), XlaBlock)
    with pytest.raises(ValueError, match="at least one machine"):
        config_of("topologies=[]")


def test_results_tell_hidden_from_exposed(script, config_of, monkeypatch):
    monkeypatch.setattr(script, "versions", lambda *names: {})
    config = config_of()
    programs = [_program(script, HIDDEN), _program(script, EXPOSED, "backward")]
    script.write_results(config, programs)
    with (config.output / "permutes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["direction"], row["covered_by"], row["overlapped"]) for row in rows] == [
        ("forward", "1", "yes"),
        ("backward", "0", "NO"),
    ]
    summary = json.loads((config.output / "summary.json").read_text())
    assert (summary["permutes"], summary["asynchronous"], summary["overlapped"]) == (2, 2, 1)
    assert summary["peak_bytes"] == {"v5e:2x4 forward": 1024, "v5e:2x4 backward": 1024}
    assert (config.output / "timeline.png").stat().st_size > 1000


def test_the_picture_shows_transfers_over_kernels(script):
    figure = script.draw([_program(script, HIDDEN), _program(script, EXPOSED, "backward")])
    hidden, exposed = figure.axes
    kernel, transfer = hidden.collections
    (left, _), (right, _) = transfer.get_paths()[0].get_extents().get_points()
    (begin, _), (end, _) = kernel.get_paths()[0].get_extents().get_points()
    assert left < begin < end < right
    assert len(exposed.collections) == 1


@pytest.mark.parametrize(("text", "hidden"), [(HIDDEN, True), (EXPOSED, False)])
def test_the_last_line_counts_and_the_verdict_follows(script, config_of, monkeypatch, capsys, text, hidden):
    monkeypatch.setattr(script, "versions", lambda *names: {})
    monkeypatch.setattr(script, "compile_ring", lambda config, topology: [_program(script, text)])
    config = config_of("topologies=[v5e:2x4]")
    assert script.check(config) is hidden
    assert capsys.readouterr().out.splitlines()[-1] == f"permutes=1 overlapped={int(hidden)}"
    with pytest.raises(FileExistsError, match="overwrite=true"):
        script.check(config)


def test_without_libtpu_the_remedy_is_named(script, config_of, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tpu-compile"):
        script.check(config_of())
