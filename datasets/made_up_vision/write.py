"""Writes made-up films, or any documents, as JSON lines of spans: the format in which codes of your own are read.

    python datasets/made_up_vision/write.py output=datasets/made_up_vision/data/films.jsonl

Settings: conf/write_documents.yaml.
"""

import dataclasses
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.progress import track

from ring_rl.atomic_file import refuse_existing
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.documents.document import documents_in_order
from ring_rl.lm.documents.load import DocumentsConfig, open_source
from ring_rl.lm.documents.records import record_of_spans
from ring_rl.lm.tasks.sample_files import write_json_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Which documents go where."""

    documents: DocumentsConfig
    output: Path


def write(config: WriteConfig) -> None:
    """Writes all documents, or nothing."""
    refuse_existing(config.output.parent, [config.output.name])
    source = open_source(config.documents)
    documents = documents_in_order(source, seed=None, start=0)
    shown = track(documents, total=len(source), description="writing", transient=True)
    write_json_lines(config.output, (record_of_spans(document, spans_field="spans") for document in shown))
    print(f"documents={len(source)} output={config.output}")


@hydra.main(config_path="../../conf", config_name="write_documents", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a file."""
    with exit_on_bad_input():
        write(from_mapping(WriteConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
