"""What a training begins with: a new model, or one that was trained before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from flax import nnx

from ring_rl.lm.load_model import GGUFSource, HuggingFaceSource, RunSource, load_model
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.lm.tokenizer.load import TokenizerConfig, load_tokenizer
from ring_rl.lm.tokenizer.protocol import Tokenizer
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer_config import TransformerConfig

__all__ = ["NewModelConfig", "Start", "StartConfig", "start_from"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewModelConfig:
    """A model with random weights.

    Attributes:
        name: "new".
        tokenizer: Whose ids it reads; its vocabulary is as large as they and the data's other codes need.
        tied_embedding: Whether the head is the transpose of the embedding.
        embedding_scale: Standard deviation that the embedding starts from.
        transformer: Size, parts and memory choices.
    """

    name: Literal["new"]
    tokenizer: TokenizerConfig
    tied_embedding: bool
    embedding_scale: float
    transformer: TransformerConfig


StartConfig = NewModelConfig | RunSource | HuggingFaceSource | GGUFSource


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A model that is ready to be trained.

    Attributes:
        config: What it is built from; a new one's `trained_positions` is 0.
        tokenizer: Its own.
        parameters: Reads the parameters to begin with; None draws them at random. A dry run and a run that goes on from
            a checkpoint of its own never call it, and nothing else holds what it returns.
    """

    config: LanguageModelConfig
    tokenizer: Tokenizer
    parameters: Callable[[], Any] | None


def start_from(
    config: StartConfig, *, parallel: SequenceParallel, vocabulary_size: Callable[[Tokenizer], int]
) -> Start:
    """The model that a configuration names.

    Args:
        config: a new model, or where another is.
        parallel: the mesh; parameters that are read from disk are laid out for it.
        vocabulary_size: how many ids the data need, which may have codes besides the tokenizer's.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `load_model` and `load_tokenizer` do; or the model has fewer ids
            than the data need, or no tokenizer.
    """
    if isinstance(config, NewModelConfig):
        tokenizer = load_tokenizer(config.tokenizer)
        model = LanguageModelConfig(
            name="language",
            vocabulary_size=vocabulary_size(tokenizer),
            tied_embedding=config.tied_embedding,
            embedding_scale=config.embedding_scale,
            trained_positions=0,
            transformer=config.transformer,
        )
        return Start(model, tokenizer, None)
    loaded = load_model(config, parallel, weights=False)
    tokenizer = loaded.named_tokenizer()
    if (needed := vocabulary_size(tokenizer)) > loaded.config.vocabulary_size:
        raise ValueError(
            f"the data have {needed} ids, but the model embeds {loaded.config.vocabulary_size}; leave out the "
            f"modalities, or train a new model"
        )
    return Start(loaded.config, tokenizer, lambda: nnx.state(load_model(config, parallel).model, nnx.Param))
