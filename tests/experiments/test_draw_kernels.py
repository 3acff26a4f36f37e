"""The kernels' page: its examples run, its pictures are there and show what the library does, its names exist."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ring_rl.kernels import CAUSAL, attention, reference_attention
from ring_rl.kernels.cost import STRATEGIES
from ring_rl.kernels.layout import LAYOUTS
from ring_rl.kernels.local.block import LOCAL_NAMES
from ring_rl.kernels.pairs import visible_pairs

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "ring_rl" / "kernels" / "README.md"
LINKS = set(re.findall(r"\]\((?!https?:|#)([^)#]+)\)", PAGE.read_text()))


@pytest.fixture(scope="module")
def draw_kernels():
    spec = importlib.util.spec_from_file_location("draw_kernels", REPOSITORY / "experiments" / "draw_kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_examples_are_exact():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, names)  # the page is part of this repository
    assert names["ring"] == len(jax.devices()) == 8
    q, k, v = names["q"], names["k"], names["v"]
    out, log_sum_exp = reference_attention(q, k, v, mask=CAUSAL)
    np.testing.assert_allclose(names["out"], out, atol=1e-5)
    # Of the virtual ring the devices are the first axis; in layout order, as the mesh's.
    by_device = np.concatenate(names["virtual"].log_sum_exp, axis=-1)
    np.testing.assert_allclose(by_device, names["log_sum_exp"], atol=1e-5)
    np.testing.assert_allclose(np.sort(by_device), np.sort(log_sum_exp), atol=1e-5)
    ids, counts = np.unique(names["segment_ids"], return_counts=True)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {-1: 8, 0: 400, 1: 500, 2: 100}


def test_everything_it_links_to_exists():
    assert len(LINKS) >= 6
    missing = {link for link in LINKS if not (PAGE.parent / link).resolve().exists()}
    assert not missing


def test_sections_it_links_to_exist():
    text = PAGE.read_text()
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    wanted = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert len(wanted) >= 7
    assert wanted <= anchors


def test_every_argument_and_choice_has_its_line():
    tables = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("|"))
    for name in list(inspect.signature(attention).parameters)[3:]:
        assert re.search(rf"`{name}=", tables), name
    for choice in (*STRATEGIES, *LAYOUTS, *LOCAL_NAMES):
        assert f'"{choice}"' in PAGE.read_text(), choice


def test_draws_the_pictures_that_the_page_shows(draw_kernels, tmp_path):
    draw_kernels.draw(tmp_path, overwrite=False)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shown = {Path(link).name for link in LINKS if "/kernel_figures/" in link and link.endswith(".png")}
    assert set(drawn) == shown
    for name, content in drawn.items():
        assert content.startswith(b"\x89PNG"), name
        assert len(content) < 100_000, name
        assert (draw_kernels.FIGURES_FOLDER / name).stat().st_size < 100_000, name


def test_keeps_pictures_that_are_there(draw_kernels, tmp_path):
    mine = tmp_path / "window.png"
    mine.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"window\.png already; give another --output or --overwrite"):
        draw_kernels.draw(tmp_path, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["window.png"]
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("device", [0, 3])
def test_the_timeline_is_that_of_a_ring(draw_kernels, direction, device):
    events = draw_kernels.record_ring(direction, device=device)
    sends = [event.what for event in events if isinstance(event, draw_kernels.Send)]
    hops = draw_kernels.RING_SIZE - 1
    assert sends.count("k, v") == hops
    assert sends.count("dk, dv") == (hops if direction == "backward" else 0)
    # Whatever is sent, a tied block follows before the end: nothing is awaited without work in between.
    blocks = [event for event in events if isinstance(event, draw_kernels.Block)]
    last_send = max(i for i, event in enumerate(events) if isinstance(event, draw_kernels.Send))
    assert any(event.tied for event in events[last_send:] if isinstance(event, draw_kernels.Block))
    assert {block.device for block in blocks} == set(range(draw_kernels.RING_SIZE))
    # Pairs on the diagonal count by half there.
    tokens = 8 * draw_kernels.RING_SIZE
    pairs = (visible_pairs(CAUSAL, tokens) - tokens / 2) / draw_kernels.RING_SIZE
    assert sum(block.work for block in blocks) == draw_kernels.PRODUCTS[direction] * pairs


def test_holders_follow_the_layout(draw_kernels):
    assert draw_kernels.holders(8, "contiguous").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert draw_kernels.holders(8, "zigzag").tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert draw_kernels.holders(8, "striped").tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
