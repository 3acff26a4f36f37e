"""The check of perplexity on a short document, and what it says of a wrong one."""

import json

import pytest

SMALL = [
    "documents=text_folder",
    "documents.part=all",
    "documents.held_out_share=0",
    "document=a.txt",
    "tokens=144",
    "window=32",
    "stride=16",
    "ring_sizes=[1,4]",
    "chunks=2",
    "transformer.layers=1",
    "transformer.attention_block_size=16",
]


@pytest.fixture
def options(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(32 + i * i % 95) for i in range(200)))
    return [*SMALL, f"documents.source.root={tmp_path}", f"output={tmp_path}/checked"]


def test_both_rules_agree_on_both_rings(call_script, options, tmp_path, capsys):
    call_script("check_perplexity", *options)
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("agrees=true")
    rows = json.loads((tmp_path / "checked" / "summary.json").read_text())["rows"]
    assert [(row["rule"], row["ring_size"], row["tokens"]) for row in rows] == [
        ("truncated", 1, 143),
        ("sliding", 1, 143),
        ("truncated", 4, 143),
        ("sliding", 4, 143),
    ]
    assert all(row["perplexity"] == pytest.approx(row["plain_perplexity"], rel=1e-5) for row in rows)
    # A context of at most 32 tokens is another question than one of 143.
    assert abs(rows[0]["plain_perplexity"] / rows[1]["plain_perplexity"] - 1) > 1e-3


def test_a_difference_is_an_error(call_script, refused, options):
    complaint = refused(call_script, "check_perplexity", *options, "ring_sizes=[1]", "tolerance=0")
    assert "more than tolerance=0" in complaint


def test_what_cannot_be_checked_is_refused_before_anything_is_read(call_script, refused, options):
    assert "not among a.txt" in refused(call_script, "check_perplexity", *options, "document=b.txt")
    assert "200 tokens, fewer than tokens=300" in refused(call_script, "check_perplexity", *options, "tokens=300")
    complaint = refused(call_script, "check_perplexity", *options, "transformer.rotary_fraction=0.5")
    assert "LLaMA's block alone" in complaint
