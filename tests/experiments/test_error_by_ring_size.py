"""The curve of errors by ring size, small, and that it would show an error that grows."""

import csv
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

REPOSITORY = Path(__file__).parents[2]
SMALL = ["tokens=32", "seeds=1", "heads=1", "head_dim=8", "ring_sizes=[1,2]", "layouts=[zigzag]"]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
    return importlib.import_module("error_by_ring_size")


@pytest.fixture
def configured(module, tmp_path):
    """The composed configuration with these overrides."""

    def call(*overrides):
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            return compose("error_by_ring_size", overrides=[f"output={tmp_path / 'errors'}", *SMALL, *overrides])

    return call


def test_a_small_curve(module, configured, tmp_path, capsys, refused):
    module.main.__wrapped__(configured())
    with (tmp_path / "errors" / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 5  # dtypes, variants, quantities
    for row in rows:
        limit = 1e-5 if row["dtype"] == "float32" else 5e-2
        assert 0 <= float(row["rms_error"]) <= limit, row
    assert any(float(row["max_error"]) > 1e-4 for row in rows if row["dtype"] == "bfloat16")
    assert (tmp_path / "errors" / "error.png").read_bytes().startswith(b"\x89PNG")
    growth = json.loads((tmp_path / "errors" / "summary.json").read_text())["growth"]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == " ".join(f"max_growth_{name}={max(of.values()):.2f}" for name, of in growth.items())
    assert "holds errors.csv" in refused(module.main.__wrapped__, configured())


def test_the_block_that_is_named_computes(module, configured, tmp_path, refused):
    complaint = refused(module.main.__wrapped__, configured("local_block=pallas_tpu"))
    assert "local attention block 'pallas_tpu' cannot serve" in complaint
    assert not (tmp_path / "errors").exists()


def test_an_error_that_grows_with_the_ring_is_seen(module, configured):
    config = module.from_mapping(module.ErrorConfig, module.resolve(configured("seeds=2")))
    rows = [
        module.Row("float32", "zigzag", size, seed, quantity, 1e-7, (3 if (size, quantity) == (2, "dk") else 1) * 1e-7)
        for size in config.ring_sizes
        for seed in range(2)
        for quantity in module.Results._fields
    ]
    growth = module.growth(config, rows, "float32")
    assert growth["dk rms_error"] == pytest.approx(3)
    assert max(value for name, value in growth.items() if name != "dk rms_error") == pytest.approx(1)


def test_errors_are_relative(module):
    exact = module.Results(*(np.array([[3.0, -4.0]]) for _ in range(5)))
    found = module.Results(*(np.array([[3.0, -4.0]]) for _ in range(4)), np.array([[3.0, -4.4]]))
    errors = {name: values for name, *values in module.compare(found, exact)}
    assert errors["dv"] == pytest.approx([0.1, 0.4 / 5])
    assert errors["out"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("ring_sizes=[2,4]", r"ring_sizes must hold 1, which growth is measured from, got \[2, 4\]"),
        ("ring_sizes=[1,3]", "sequence length 32 is not divisible into the 6 chunks of a zigzag ring"),
        ("seeds=0", "seeds must be at least 1, got 0"),
    ],
)
def test_bad_configurations_are_refused(module, configured, override, complaint):
    with pytest.raises(ValueError, match=complaint):
        module.from_mapping(module.ErrorConfig, module.resolve(configured(override)))
