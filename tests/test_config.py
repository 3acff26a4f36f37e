from __future__ import annotations

import dataclasses
import errno
import pathlib
import re
import subprocess
import sys
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.config import describe_differences, exit_on_bad_input, from_mapping, to_mapping


@dataclasses.dataclass(frozen=True)
class Adam:
    name: Literal["adam"]
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Sgd:
    name: Literal["sgd", "nesterov"]
    momentum: float

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}; try 0.9")


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int
    widths: tuple[int, ...]
    betas: tuple[float, float]
    window: int | None
    causal: bool
    local: Literal["auto", "xla"] | int


@dataclasses.dataclass(frozen=True)
class Experiment:
    model: Model
    optimizer: Adam | Sgd
    teacher: Model | None
    folder: pathlib.Path
    weights: dict[str, float]
    title: str


MODEL = {
    "layers": 2,
    "widths": [8, 16],
    "betas": [0.9, 1],
    "window": None,
    "causal": True,
    "local": "auto",
}
EXPERIMENT = {
    "model": MODEL,
    "optimizer": {"name": "adam", "learning_rate": 1},
    "teacher": None,
    "folder": "runs/a",
    "weights": {"action": 1, "reward": 0.5},
    "title": "a",
}


def with_value(path: str, value: object) -> dict:
    """EXPERIMENT with one leaf replaced or added."""

    def replaced(mapping: dict, keys: list[str]) -> dict:
        head, *rest = keys
        return {**mapping, head: replaced(mapping[head], rest) if rest else value}

    return replaced(EXPERIMENT, path.split("."))


def test_nested_mapping_becomes_typed_dataclasses():
    experiment = from_mapping(Experiment, EXPERIMENT)
    assert experiment.model == Model(2, (8, 16), (0.9, 1.0), None, True, "auto")
    assert type(experiment.model.betas[1]) is float
    assert experiment.optimizer == Adam("adam", 1.0)
    assert type(experiment.optimizer.learning_rate) is float
    assert experiment.folder == pathlib.Path("runs/a")
    assert experiment.weights == {"action": 1.0, "reward": 0.5}
    assert hash(experiment.model) == hash(from_mapping(Model, MODEL))


def test_to_mapping_is_the_inverse():
    experiment = from_mapping(Experiment, EXPERIMENT)
    assert from_mapping(Experiment, to_mapping(experiment)) == experiment
    assert to_mapping(experiment)["folder"] == "runs/a"
    assert to_mapping(experiment)["model"]["widths"] == [8, 16]


@given(
    layers=st.integers(),
    widths=st.lists(st.integers(), max_size=4),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    window=st.none() | st.integers(),
    causal=st.booleans(),
    local=st.sampled_from(["auto", "xla"]) | st.integers(),
)
def test_round_trip_of_any_model(layers, widths, betas, window, causal, local):
    model = Model(layers, tuple(widths), betas, window, causal, local)
    assert from_mapping(Model, to_mapping(model)) == model


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.layer", 1, "unknown key 'model.layer'; did you mean 'layers'? allowed keys: layers, widths"),
        ("qqq", 1, "unknown key 'qqq'; allowed keys: model, optimizer"),
        ("model.layers", True, "'model.layers' must be an int, got True (bool)"),
        ("model.layers", 2.0, "'model.layers' must be an int, got 2.0 (float)"),
        ("model.layers", "2", "'model.layers' must be an int, got '2' (str)"),
        ("model.causal", 1, "'model.causal' must be a bool (true or false), got 1 (int)"),
        ("model.window", "none", "'model.window' must be an int, got 'none' (str); null is allowed too"),
        ("model.widths", [8, "a"], "'model.widths[1]' must be an int, got 'a' (str)"),
        ("model.widths", "8", "'model.widths' must be a list, got '8' (str)"),
        ("model.betas", [0.9], "'model.betas' must be a list of length 2, got [0.9] (list)"),
        ("model.betas", [0.9, True], "'model.betas[1]' must be a float, got True (bool)"),
        ("model.local", "cuda", "'model.local' must be one of auto, xla or an int, got 'cuda' (str)"),
        ("model", 3, "'model' must be a mapping with the keys layers, widths"),
        ("optimizer.learning_rate", "1e-4", "'optimizer.learning_rate' must be a float, got '1e-4' (str)"),
        ("optimizer.name", "lion", "'optimizer.name' must be one of adam, sgd, nesterov, got 'lion' (str)"),
        ("optimizer", {"learning_rate": 1.0}, "missing key 'optimizer.name'; it must be one of adam, sgd"),
        (
            "optimizer",
            {"name": "sgd", "momentum": 2},
            "optimizer: momentum must lie in [0, 1), got 2.0; try 0.9",
        ),
        ("optimizer", {"name": "sgd"}, "missing key 'optimizer.momentum'"),
        ("teacher", {**MODEL, "layers": "x"}, "'teacher.layers' must be an int, got 'x' (str)"),
        ("weights.action", "x", "'weights.action' must be a float, got 'x' (str)"),
        ("weights", {1: 1.0}, "'weights' must be a mapping with string keys"),
        ("title", None, "'title' must be a string, got None (NoneType)"),
        ("folder", "", "'folder' must be a path (a non-empty string), got '' (str)"),
    ],
)
def test_bad_input_names_path_value_and_remedy(path, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        from_mapping(Experiment, with_value(path, value))
    assert "\n" not in str(caught.value)


def test_variant_is_chosen_by_its_name():
    experiment = from_mapping(Experiment, with_value("optimizer", {"name": "nesterov", "momentum": 0.5}))
    assert experiment.optimizer == Sgd("nesterov", 0.5)


def test_missing_key_names_its_place():
    with pytest.raises(ValueError, match=r"missing key 'outer\.model'"):
        from_mapping(Experiment, {key: EXPERIMENT[key] for key in EXPERIMENT if key != "model"}, path="outer")


def test_an_annotation_it_does_not_know_is_the_programmers_mistake():
    @dataclasses.dataclass(frozen=True)
    class Loose:
        anything: list

    with pytest.raises(TypeError, match="does not know"):
        from_mapping(Loose, {"anything": []})


def test_differences_are_named_leaf_by_leaf():
    saved = {"model": {"layers": 2, "causal": True, "old": 1}, "seed": 0, "same": [1, 2]}
    wanted = {"model": {"layers": 4, "causal": 1, "new": 1}, "seed": 1, "same": [1, 2]}
    assert describe_differences(saved, wanted, ignore=("seed",)) == [
        "model.causal: saved True, wanted 1",
        "model.layers: saved 2, wanted 4",
        "model.new: not saved, wanted 1",
        "model.old: saved 1, not wanted",
    ]
    assert describe_differences({"a": {"b": {"c": 1}}}, {"d": {}}) == [
        "a.b.c: saved 1, not wanted",
        "d: not saved, wanted {}",
    ]
    assert describe_differences(saved, saved) == []
    assert describe_differences(saved, wanted, ignore=("model", "seed")) == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("rule, value,\n remedy"),
        FileNotFoundError("rule, value, remedy"),
        FileExistsError("rule, value, remedy"),
        ImportError("rule, value, remedy"),
    ],
)
def test_expected_errors_become_one_line(error, capsys):
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        raise error
    assert exit_info.value.code == 1
    captured = capsys.readouterr().err
    assert captured.startswith("error: rule, value, remedy")
    assert captured.count("\n") == 1


def test_an_unstable_simulation_becomes_one_line(capsys):
    with pytest.raises(SystemExit), exit_on_bad_input():
        raise FloatingPointError("the simulation became unstable; use another seed")
    captured = capsys.readouterr().err
    assert captured.startswith("error: the simulation became unstable; use another seed")
    assert captured.count("\n") == 1


def test_a_full_disk_becomes_one_line(capsys):
    with pytest.raises(SystemExit), exit_on_bad_input():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert "No space left on device: 'runs/a'" in capsys.readouterr().err


def test_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setenv("RING_RL_TRACEBACK", "1")
    with pytest.raises(SystemExit), exit_on_bad_input():
        raise ValueError("rule")
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert "error: rule" in captured


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), exit_on_bad_input():
        raise KeyError("bug")


def test_interrupt_exits_with_130(capsys):
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        raise KeyboardInterrupt
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(SystemExit), exit_on_bad_input():
        raise KeyboardInterrupt("step 5 is saved")
    assert capsys.readouterr().err == "interrupted: step 5 is saved\n"


def test_importing_config_loads_neither_jax_nor_omegaconf():
    source = "import sys, ring_rl.config, ring_rl.hydra_config; print({'jax', 'omegaconf'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
