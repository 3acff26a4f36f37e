"""Documents as a configuration names them: opened, tokenized, packed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ring_rl.lm.documents.document import DocumentSource, Part, PartOfDocuments
from ring_rl.lm.documents.json_lines import JsonLines, JsonLinesConfig
from ring_rl.lm.documents.made_up_vision import MadeUpVision, MadeUpVisionConfig
from ring_rl.lm.documents.modality import MixedVocabulary, ModalityConfig
from ring_rl.lm.documents.packed_documents import PackedDocuments
from ring_rl.lm.documents.packing import PackingConfig
from ring_rl.lm.documents.parquet import Parquet, ParquetConfig
from ring_rl.lm.documents.python_sources import PythonSources, PythonSourcesConfig
from ring_rl.lm.documents.text_folder import TextFolder, TextFolderConfig
from ring_rl.lm.documents.tokenize_documents import DocumentTokens, tokenize_documents
from ring_rl.lm.documents.tokenized import TokenizedDocuments
from ring_rl.lm.tokenizer.protocol import Tokenizer

__all__ = ["DocumentsConfig", "SourceConfig", "mixed_vocabulary", "open_source", "packed_documents", "read_tokens"]

SourceConfig = TextFolderConfig | JsonLinesConfig | ParquetConfig | PythonSourcesConfig | MadeUpVisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """A corpus, and how it is read.

    Attributes:
        source: where the documents come from.
        part: all of them, those for training, or those held out.
        held_out_share: share of the documents that are held out, chosen by their names.
        held_out_names: documents that are held out besides.
        begin_token: whether the tokenizer's begin token comes first in every document.
        end_token: whether its end token comes last.
        text_loss_weight: what a token of text counts in the loss.
        modalities: vocabularies of codes besides text, in the order of their ids.
        token_cache: a folder that keeps the tokens; null makes them anew, in memory.
        packing: how documents share rows.
    """

    source: SourceConfig
    part: Part
    held_out_share: float
    held_out_names: tuple[str, ...]
    begin_token: bool
    end_token: bool
    text_loss_weight: float
    modalities: tuple[ModalityConfig, ...]
    token_cache: Path | None
    packing: PackingConfig


def open_source(config: DocumentsConfig) -> DocumentSource:
    """The documents of `config.part`, unread.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: there are no documents in them.
    """
    source = _open(config.source)
    if not len(source):
        raise ValueError(f"documents.source={config.source.name} holds no document; name other files")
    return PartOfDocuments(
        source,
        part=config.part,
        held_out_share=config.held_out_share,
        held_out_names=config.held_out_names,
    )


def mixed_vocabulary(config: DocumentsConfig, tokenizer: Tokenizer) -> MixedVocabulary:
    """The ids of text and codes; a model that reads these documents needs a vocabulary of its `size`."""
    return MixedVocabulary(
        text_size=tokenizer.vocabulary_size,
        text_loss_weight=config.text_loss_weight,
        modalities=config.modalities,
    )


def read_tokens(config: DocumentsConfig, tokenizer: Tokenizer, *, progress: bool) -> TokenizedDocuments:
    """All documents of `config.part` as tokens.

    Raises:
        FileNotFoundError, ValueError, OSError: as `open_source` and `tokenize_documents` do.
    """
    document_tokens = DocumentTokens(
        tokenizer=tokenizer,
        vocabulary=mixed_vocabulary(config, tokenizer),
        begin_token=config.begin_token,
        end_token=config.end_token,
    )
    return tokenize_documents(open_source(config), document_tokens, cache=config.token_cache, progress=progress)


def packed_documents(
    documents: TokenizedDocuments,
    config: DocumentsConfig,
    tokenizer: Tokenizer,
    *,
    row_length: int,
    seed: int | tuple[int, ...],
) -> PackedDocuments:
    """Rows of `row_length` tokens of what `read_tokens` read, for a `RowStream`.

    Raises:
        ValueError: as `PackedDocuments` does.
    """
    return PackedDocuments(
        documents,
        row_length=row_length,
        config=config.packing,
        kind_weights=mixed_vocabulary(config, tokenizer).weights,
        seed=seed,
    )


def _open(config: SourceConfig) -> DocumentSource:
    match config:
        case TextFolderConfig():
            return TextFolder(config)
        case JsonLinesConfig():
            return JsonLines(config)
        case ParquetConfig():
            return Parquet(config)
        case PythonSourcesConfig():
            return PythonSources(config)
        case MadeUpVisionConfig():
            return MadeUpVision(config)
