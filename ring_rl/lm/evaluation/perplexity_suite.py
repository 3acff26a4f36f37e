"""Perplexity of long documents against the length of the context: what a model makes of more of the same text."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ring_rl.atomic_file import write_whole
from ring_rl.lm.documents.load import DocumentsConfig
from ring_rl.lm.documents.tokenized import TokenizedDocuments
from ring_rl.lm.evaluation.perplexity import Perplexity, sliding_losses, truncated_losses
from ring_rl.lm.evaluation.plots import length_label, plot_curves
from ring_rl.lm.evaluation.sample_log import SampleLog
from ring_rl.lm.model import LanguageModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.tables import markdown_table
from ring_rl.typing import Int32

__all__ = [
    "PerplexityConfig",
    "PerplexityRecord",
    "chosen_documents",
    "evaluate_perplexity",
    "missing_perplexities",
    "write_perplexity_report",
]

Rule = Literal["truncated", "sliding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """Documents, read with contexts of several lengths.

    Attributes:
        name: Of the suite.
        rules: "truncated": the first `length` tokens in one window. "sliding": the first `document_tokens`, in windows
            of `length` tokens that move by `stride`, so that all lengths predict the same tokens.
        lengths: Tokens of a window, ascending.
        stride: Of sliding windows, at most the shortest length.
        document_tokens: That a document must have and of which no more are read; at least the longest length.
        samples: Documents at most; the first ones by their names' order in the corpus.
        chunks: Steps in which the head runs; divides the tokens of a device.
        documents: The corpus.
    """

    name: Literal["perplexity"]
    rules: tuple[Rule, ...]
    lengths: tuple[int, ...]
    stride: int
    document_tokens: int
    samples: int
    chunks: int
    documents: DocumentsConfig

    def __post_init__(self) -> None:
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"suite.rules must name at least one rule, and each once, got {list(self.rules)}")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 2:
            raise ValueError(f"suite.lengths must be at least 2 and ascend, got {list(self.lengths)}")
        if self.document_tokens < self.lengths[-1]:
            raise ValueError(
                f"suite.document_tokens={self.document_tokens} must be at least the longest length {self.lengths[-1]}"
            )
        if not 1 <= self.stride <= self.lengths[0]:
            raise ValueError(f"suite.stride must be in [1, {self.lengths[0]}], the shortest length, got {self.stride}")
        if self.samples < 1:
            raise ValueError(f"suite.samples must be at least 1, got {self.samples}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityRecord:
    """One document at one length: a line of `samples.jsonl`.

    Attributes:
        rule: "truncated" or "sliding".
        length: Of a window.
        document: Its name.
        loss_sum: Σ -log p, in nats.
        tokens: How many were predicted.
    """

    rule: Rule
    length: int
    document: str
    loss_sum: float
    tokens: int

    @property
    def key(self) -> tuple[Rule, int, str]:
        """What it is found by."""
        return (self.rule, self.length, self.document)


def chosen_documents(documents: TokenizedDocuments, config: PerplexityConfig) -> dict[str, Int32[np.ndarray, " n"]]:
    """The first `document_tokens` of the documents that have so many.

    Raises:
        ValueError: None is as long.
    """
    long = [index for index, tokens in enumerate(documents.lengths) if tokens >= config.document_tokens]
    if not long:
        raise ValueError(
            f"no document has {config.document_tokens} tokens, the longest of {len(documents)} has "
            f"{max(documents.lengths, default=0)}; lower suite.document_tokens and lengths"
        )
    return {
        documents.names[index]: documents.tokens(index, 0, config.document_tokens) for index in long[: config.samples]
    }


def missing_perplexities(
    config: PerplexityConfig, names: Sequence[str], log: SampleLog[PerplexityRecord]
) -> list[tuple[Rule, int, str]]:
    """What is still to be read, in order."""
    wanted: list[tuple[Rule, int, str]] = [
        (rule, length, name) for rule in config.rules for length in config.lengths for name in names
    ]
    return [key for key in wanted if key not in log.records]


def evaluate_perplexity(
    model: LanguageModel,
    documents: Mapping[str, Int32[np.ndarray, " n"]],
    config: PerplexityConfig,
    log: SampleLog[PerplexityRecord],
    *,
    parallel: SequenceParallel,
    batch_tokens: int,
    on_samples: Callable[[str, int], None],
) -> None:
    """Reads what the log lacks; `on_samples` hears what it was and of how many documents.

    Raises:
        ValueError: The mesh cannot share windows of one of the lengths; before anything is read.
    """
    shards = math.prod(parallel.size(axis) for axis in parallel.batch_axes)
    for length in config.lengths:
        parallel.check(shards, length)
    for rule, length, name in missing_perplexities(config, list(documents), log):
        if rule == "truncated":
            (losses,) = truncated_losses(
                model, [documents[name]], length=length, parallel=parallel, chunks=config.chunks, batch_size=shards
            )
        else:
            losses = sliding_losses(
                model,
                documents[name],
                window=length,
                stride=config.stride,
                parallel=parallel,
                chunks=config.chunks,
                batch_size=shards * max(1, batch_tokens // (length * shards)),
            )
        found = Perplexity.of(losses)
        record = PerplexityRecord(rule=rule, length=length, document=name, loss_sum=found.loss_sum, tokens=found.tokens)
        log.append([record])
        on_samples(f"{rule}, {length} tokens", 1)


def write_perplexity_report(
    records: Sequence[PerplexityRecord],
    output: Path,
    *,
    name: str,
    trained_length: int | None,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes CSV, a table, a summary and a picture into `output`, and returns the summary.

    Sums of losses are divided once, over the tokens of all documents; documents stand beside.
    """
    together: dict[tuple[Rule, int], Perplexity] = {}
    for each in records:
        so_far = together.get((each.rule, each.length), Perplexity(0.0, 0))
        together[each.rule, each.length] = so_far + Perplexity(each.loss_sum, each.tokens)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rule", "length", "document", "tokens", "loss_sum", "perplexity"])
    for each in records:
        value = Perplexity(each.loss_sum, each.tokens).value
        writer.writerow([each.rule, each.length, each.document, each.tokens, f"{each.loss_sum:.6g}", f"{value:.6g}"])
    write_whole(output / "perplexity.csv", text.getvalue())
    lengths = sorted({length for _, length in together})
    rules: list[Rule] = list(dict.fromkeys(rule for rule, _ in together))
    rows = [["rule", "documents", *map(length_label, lengths)]]
    for rule in rules:
        documents = len({each.document for each in records if each.rule == rule})
        rows.append([rule, str(documents), *(f"{together[rule, length].value:.3f}" for length in lengths)])
    write_whole(output / "table.md", markdown_table(rows))
    plot_curves(
        {rule: [(length, together[rule, length].value) for length in lengths] for rule in rules},
        output / "perplexity_by_length.png",
        title=f"{name}: perplexity of {len({each.document for each in records})} documents",
        y_label="perplexity",
        trained_length=trained_length,
    )
    summary = {
        "suite": "perplexity",
        "model": name,
        "trained_length": trained_length,
        "settings": dict(settings),
        **provenance,
        "documents": sorted({each.document for each in records}),
        "perplexity": [
            {"rule": rule, "length": length, "value": found.value, "tokens": found.tokens}
            for (rule, length), found in together.items()
        ],
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
