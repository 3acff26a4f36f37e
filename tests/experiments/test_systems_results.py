"""The committed tables of layers and formulas follow from the figures beside them."""

import csv
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def cells(path):
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in path.read_text().splitlines()[2:]]


@pytest.mark.parametrize("machine", ["cpu", "v5e-8"])
def test_the_table_of_a_layer_follows_from_its_bytes(machine):
    folder = RESULTS / "layer_memory" / machine
    rows, shown = rows_of(folder / "memory.csv"), cells(folder / "table.md")
    totals = [max(int(row["attention_bytes"]), int(row["feed_forward_bytes"])) for row in rows]
    ratios = [total / int(row["paper_bytes"]) for row, total in zip(rows, totals, strict=True)]
    assert [line[5] for line in shown] == [f"{total / 1e6:,.0f}" for total in totals]
    assert [line[7] for line in shown] == [f"{ratio:.2f}" for ratio in ratios]
    for row, ratio, line in zip(rows, ratios, shown, strict=True):
        if row["architecture"] != "ring":
            assert line[8] == f"{ratio / ratios[3 if row['direction'] == 'forward' else 7] - 1:+.0%}"
    assert json.loads((folder / "summary.json").read_text())["commit"]


def test_on_cpu_devices_every_ratio_but_one_is_the_papers():
    rows = rows_of(RESULTS / "layer_memory" / "cpu" / "memory.csv")
    ratio = {
        (row["architecture"], row["direction"]): max(int(row["attention_bytes"]), int(row["feed_forward_bytes"]))
        / int(row["paper_bytes"])
        for row in rows
    }
    for direction in ("forward", "training"):
        for architecture in ("vanilla", "memory_efficient_attention"):
            assert ratio[architecture, direction] == pytest.approx(ratio["ring", direction], rel=0.25)
        # It counts one array of four.
        assert ratio["blockwise_transformer", direction] > 2 * ratio["ring", direction]


def test_the_table_of_overlap_follows_from_its_figures():
    folder = RESULTS / "systems_tables"
    for row, line in zip(rows_of(folder / "overlap.csv"), cells(folder / "overlap.md"), strict=True):
        assert line[0] == row["hardware"]
        assert line[4] == f"{float(row['block']) / 1e3:,.1f}"
        assert line[8] == f"{float(row['one_link']) / 1e3:,.1f}"
