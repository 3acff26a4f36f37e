"""What holds for every long page: its links lead somewhere, and its contents are whole."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "ring_rl" / room / "README.md" for room in ("agent", "lm", "training")]


def anchor(heading):
    return heading.lower().replace(" ", "-")


def headings(page, level=r"#+"):
    return re.findall(rf"^{level} (.*)$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if target.startswith("http"):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            assert heading in map(anchor, headings(linked)), heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_section_is_in_the_contents(page):
    text = page.read_text()
    contents = text[: text.index("\n## ")]
    for title in headings(page, level="##"):
        assert f"(#{anchor(title)})" in contents, title
