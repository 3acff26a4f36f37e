"""Counts a corpus' documents and tokens, and the rows that they are packed into; before a training reads it.

    python datasets/text_folder/describe.py documents=text_folder documents.source.root=<folder>

Settings: conf/describe_documents.yaml.
"""

import dataclasses

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.documents.load import DocumentsConfig, mixed_vocabulary, read_tokens
from ring_rl.lm.documents.packed_documents import PackedDocuments
from ring_rl.lm.tokenizer.load import TokenizerConfig, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """Which documents, in whose tokens."""

    tokenizer: TokenizerConfig
    row_length: int
    listed: int
    documents: DocumentsConfig


def describe(config: DescribeConfig) -> None:
    """Prints the longest documents, and name=value of the whole as the last line."""
    tokenizer = load_tokenizer(config.tokenizer)
    documents = read_tokens(config.documents, tokenizer, progress=True)
    packed = PackedDocuments(
        documents,
        row_length=config.row_length,
        config=config.documents.packing,
        kind_weights=mixed_vocabulary(config.documents, tokenizer).weights,
        seed=0,
    )
    lengths = documents.lengths
    table = Table("document", "tokens")
    for index in np.argsort(-lengths, kind="stable")[: config.listed]:
        table.add_row(documents.names[index], f"{lengths[index]:,}")
    console = Console()
    console.print(table)
    middle, ninth = np.quantile(lengths, [0.5, 0.9])
    figures = {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "median": int(middle),
        "p90": int(ninth),
        "longest": int(lengths.max()),
        "rows": packed.rows_per_epoch,
        "row_length": config.row_length,
        "padding_share": f"{packed.padding_share:.4f}",
    }
    print(" ".join(f"{name}={value}" for name, value in figures.items()))


@hydra.main(config_path="../../conf", config_name="describe_documents", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a description."""
    with exit_on_bad_input():
        describe(from_mapping(DescribeConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
