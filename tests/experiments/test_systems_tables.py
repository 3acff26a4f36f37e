"""The paper's tables by formula: what is printed is reproduced, and what is written follows from it."""

import csv
import json

import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("systems_tables")


@pytest.fixture
def config(script, pytestconfig):
    def call(*overrides):
        with initialize_config_dir(str(pytestconfig.rootpath / "conf"), version_base="1.3"):
            return from_mapping(script.TablesConfig, resolve(compose("systems_tables", overrides=list(overrides))))

    return call


def test_all_that_is_printed_is_reproduced_but_the_infiniband_row(script, call_script, tmp_path, capsys):
    output = tmp_path / "tables"
    call_script("systems_tables", f"output={output}")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "overlap_printed=10 overlap_reproduced=8 flops_printed=54 flops_reproduced=54"

    with (output / "overlap.csv").open() as file:
        rows = {row["hardware"]: row for row in csv.DictReader(file)}
    wrong = [
        name
        for name, row in rows.items()
        if row["printed_block"] and script.differs(float(row["block"]) / 1e3, float(row["printed_block"]) / 1e3)
    ]
    assert wrong == ["A100 InfiniBand"]
    # A ring's neighbour is one link away: of an MI300X's seven, and none of a switch's.
    assert float(rows["MI300X"]["one_link"]) == pytest.approx(7 * float(rows["MI300X"]["block"]))
    assert float(rows["H100 NVLink"]["one_link"]) == pytest.approx(float(rows["H100 NVLink"]["block"]))
    # 1.6 for the float32 sums on their way home, 2 for the causal half, a quarter for 4 queries a key.
    for row in rows.values():
        assert float(row["training"]) == pytest.approx(3.2 * float(row["one_link"]))
        assert float(row["grouped"]) == pytest.approx(0.8 * float(row["one_link"]))
    assert "| H100 NVLink | 989 | 450 | 1 | 2.2 |  | 13.2 |  |" in (output / "overlap.md").read_text()
    assert (
        "| 7B | 4096 | 1.1 | 1.4 | 2.0 | 3.1 | 5.4 | 10.0 | 37.4 | 439.7 | 4682.0 |"
        in (output / "flops.md").read_text()
    )
    for picture in ("overlap.png", "flops.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((output / "summary.json").read_text())
    assert all(entry["source"] for entry in summary["hardware"].values())


def test_another_printed_figure_is_counted_and_shown(script, config):
    printed = "[1.2,1.4,1.8,2.8,4.6,8.4,31.0,362.3,3855.9]"
    found = config(f"data_set.printed={{13B: {printed}}}")
    tables = {"overlap": [], "flops": script.flops_ratios(found.data_set), "growth": []}
    assert script.last_line(tables).endswith("flops_printed=54 flops_reproduced=53")
    assert script.as_text(found, tables)["flops"][2][:4] == ["13B", "5120", "1.1 (1.2)", "1.4"]


def test_refusals(call_script, refused, tmp_path):
    output = tmp_path / "tables"
    free = refused(call_script, "systems_tables", f"output={output}", "overlap.hardware=[virtual CPU]")
    assert "transfers of 'virtual CPU' are free" in free
    unknown = refused(call_script, "systems_tables", f"output={output}", "overlap.hardware=[abacus]")
    assert "unknown hardware 'abacus'; choose of A100 NVLink, " in unknown
    short = refused(call_script, "systems_tables", f"output={output}", "data_set.multiples=[2,4]")
    assert "data_set.printed.7B needs a width and 2 ratios" in short
    assert not output.exists()
