"""Perplexity as a suite: which documents are read, what is left to read, and sums that are divided once."""

import csv
import dataclasses
import math

import numpy as np
import pytest

from ring_rl.lm.documents.tokenized import TokenizedDocument, TokenizedDocuments, TokenizedPart
from ring_rl.lm.evaluation.perplexity_suite import (
    PerplexityConfig,
    PerplexityRecord,
    chosen_documents,
    missing_perplexities,
    write_perplexity_report,
)
from ring_rl.lm.evaluation.sample_log import SampleLog


def config(**changes):
    values = {
        "name": "perplexity",
        "rules": ("truncated", "sliding"),
        "lengths": (4, 8),
        "stride": 2,
        "document_tokens": 10,
        "samples": 2,
        "chunks": 1,
        # Which corpus it is does not matter here.
        "documents": None,
    }
    return PerplexityConfig(**(values | changes))


def documents(**lengths):
    parts = [
        TokenizedDocument(name, np.arange(length, dtype=np.int32), np.zeros(length, np.uint8))
        for name, length in lengths.items()
    ]
    return TokenizedDocuments([TokenizedPart.of(parts, vocabulary_size=256, kinds=1)], vocabulary_size=256)


def test_documents_that_are_long_enough_are_read_so_far_and_no_further():
    chosen = chosen_documents(documents(short=9, a=10, b=50, c=12), config())
    assert {name: list(tokens) for name, tokens in chosen.items()} == {"a": list(range(10)), "b": list(range(10))}
    with pytest.raises(ValueError, match="no document has 10 tokens, the longest of 2 has 9"):
        chosen_documents(documents(short=9, shorter=3), config())


def test_what_is_read_is_not_read_again(tmp_path):
    with SampleLog(tmp_path, record_type=PerplexityRecord, key=lambda record: record.key, identity={}) as log:
        assert len(missing_perplexities(config(), ["a", "b"], log)) == 8
        log.append([PerplexityRecord(rule="truncated", length=4, document="a", loss_sum=1.0, tokens=3)])
        left = missing_perplexities(config(), ["a", "b"], log)
        assert len(left) == 7
        assert ("truncated", 4, "a") not in left


def test_documents_count_by_their_tokens(tmp_path):
    records = [
        PerplexityRecord(rule="sliding", length=8, document=name, loss_sum=loss, tokens=tokens)
        for name, loss, tokens in (("a", 10.0, 5), ("b", 2.0, 15))
    ]
    summary = write_perplexity_report(
        records, tmp_path, name="ours", trained_length=4, settings={}, provenance={"commit": "abc"}
    )
    (entry,) = summary["perplexity"]
    assert (entry["value"], entry["tokens"]) == (pytest.approx(math.exp(12 / 20)), 20)
    with (tmp_path / "perplexity.csv").open() as file:
        values = {row["document"]: float(row["perplexity"]) for row in csv.DictReader(file)}
    assert values == pytest.approx({"a": math.exp(2), "b": math.exp(2 / 15)}, rel=1e-4)
    assert (tmp_path / "perplexity_by_length.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rules": ()}, "at least one rule, and each once"),
        ({"lengths": (8, 4)}, r"at least 2 and ascend, got \[8, 4\]"),
        ({"document_tokens": 7}, "document_tokens=7 must be at least the longest length 8"),
        ({"stride": 5}, r"stride must be in \[1, 4\], the shortest length, got 5"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(config(), **changes)
