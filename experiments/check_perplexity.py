"""Perplexity of a long document against a plain implementation; conf/check_perplexity.yaml documents every key."""

import dataclasses
import json
import time
from pathlib import Path

import hydra
import jax
import numpy as np
from flax import nnx
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.layout import Layout
from ring_rl.lm.documents.load import DocumentsConfig, read_tokens
from ring_rl.lm.evaluation.perplexity import Perplexity, sliding_losses, truncated_losses
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.lm.tokenizer.byte_tokenizer import ByteTokenizer
from ring_rl.nn.block import Block
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.training.mesh import MeshConfig, make_mesh, request_virtual_devices
from ring_rl.training.provenance import device_description, git_commit, versions

OUTPUTS = ("summary.json",)
_QUERIES_AT_A_TIME = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is read, and how."""

    documents: DocumentsConfig
    document: str
    tokens: int
    window: int
    stride: int
    ring_sizes: tuple[int, ...]
    layout: Layout
    chunks: int
    head_gain: float
    seed: int
    tolerance: float
    output: Path
    overwrite: bool
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        if not self.ring_sizes or min(self.ring_sizes) < 1:
            raise ValueError(f"ring_sizes must hold at least one size of 1 or more, got {list(self.ring_sizes)}")
        transformer = self.transformer
        plain = (transformer.feed_forward, transformer.rotary_scaling, transformer.retrieval) == ("swiglu", None, None)
        if not plain or transformer.rotary_fraction != 1 or transformer.no_position_layers:
            raise ValueError("the plain implementation is LLaMA's block alone; set transformer=llama_tiny")


def plain_losses(model: LanguageModel, tokens: np.ndarray, *, progress: bool = False) -> np.ndarray:
    """-log p of every token but the first, in float64, by LLaMA's equations as they are written down.

    Queries come a few at a time, each against all keys before it at once.
    """
    config, blocks = model.config.transformer, model.transformer.blocks
    assert isinstance(blocks, Block), "all layers in one, as before `unstack`"
    array = lambda parameter: np.asarray(jax.device_get(parameter[...]), np.float64)  # noqa: E731
    count, half = len(tokens) - 1, config.head_dim // 2
    angles_Td = np.arange(count)[:, None] * config.rotary_base ** (-np.arange(half) / half)
    cos_T1d, sin_T1d = np.cos(angles_Td)[:, None], np.sin(angles_Td)[:, None]

    def normalised(x_TM: np.ndarray, scale_M: np.ndarray) -> np.ndarray:
        return x_TM / np.sqrt(np.mean(x_TM**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale_M

    def in_heads(x_TM: np.ndarray) -> np.ndarray:
        return x_TM.reshape(count, -1, config.head_dim)

    def turned(x_THD: np.ndarray) -> np.ndarray:
        first, second = x_THD[..., :half], x_THD[..., half:]
        return np.concatenate([first * cos_T1d - second * sin_T1d, second * cos_T1d + first * sin_T1d], axis=-1)

    x_TM = array(model.vocabulary.embedding)[tokens[:-1]]
    group = config.query_heads // config.key_value_heads
    for layer in range(config.layers):
        attention = blocks.attention
        y_TM = normalised(x_TM, array(blocks.attention_norm.scale)[layer])
        q_TM, k_TM, v_TM = (
            y_TM @ array(weights.kernel)[layer] for weights in (attention.query, attention.key, attention.value)
        )
        q_THD, k_SKD = turned(in_heads(q_TM)), turned(in_heads(k_TM))
        v_SKD = in_heads(v_TM)
        out_THD = np.empty_like(q_THD)
        for start in track(range(0, count, _QUERIES_AT_A_TIME), f"plain layer {layer}", disable=not progress):
            stop = min(start + _QUERIES_AT_A_TIME, count)
            hidden_ts = np.arange(stop) > np.arange(start, stop)[:, None]
            for head in range(config.query_heads):
                scores_ts = q_THD[start:stop, head] @ k_SKD[:stop, head // group].T / np.sqrt(config.head_dim)
                scores_ts[hidden_ts] = -np.inf
                weights_ts = np.exp(scores_ts - scores_ts.max(axis=-1, keepdims=True))
                out_tD = weights_ts @ v_SKD[:stop, head // group]
                out_THD[start:stop, head] = out_tD / weights_ts.sum(axis=-1, keepdims=True)
        x_TM = x_TM + out_THD.reshape(count, -1) @ array(attention.out.kernel)[layer]
        y_TM = normalised(x_TM, array(blocks.feed_forward_norm.scale)[layer])
        gate_TF = y_TM @ array(blocks.feed_forward_gate.kernel)[layer]
        hidden_TF = gate_TF / (1 + np.exp(-gate_TF)) * (y_TM @ array(blocks.feed_forward_in.kernel)[layer])
        x_TM = x_TM + hidden_TF @ array(blocks.feed_forward_out.kernel)[layer]
    logits_TV = normalised(x_TM, array(model.transformer.final_norm.scale)) @ array(model.vocabulary.head)
    maximum_T1 = logits_TV.max(axis=-1, keepdims=True)
    log_sum_exp_T = np.log(np.exp(logits_TV - maximum_T1).sum(axis=-1)) + maximum_T1[:, 0]
    return log_sum_exp_T - logits_TV[np.arange(count), tokens[1:]]


def plain_sliding_losses(model: LanguageModel, tokens: np.ndarray, *, window: int, stride: int) -> np.ndarray:
    """The sliding rule as a loop: the losses of a window that no window before it gave."""
    losses, begin = [], 0
    while sum(map(len, losses)) < len(tokens) - 1:
        of_window = plain_losses(model, tokens[begin : begin + window + 1])
        given = sum(map(len, losses)) - begin
        losses.append(of_window[given:])
        begin += stride
    return np.concatenate(losses)


def document_tokens(config: CheckConfig) -> np.ndarray:
    """The first tokens of the document.

    Raises:
        ValueError: there is no such document, or it is shorter.
    """
    documents = read_tokens(config.documents, ByteTokenizer(), progress=True)
    if config.document not in documents.names:
        raise ValueError(f"document={config.document} is not among {', '.join(documents.names)}")
    tokens = documents.tokens(documents.names.index(config.document), 0, config.tokens)
    if len(tokens) < config.tokens:
        raise ValueError(f"document={config.document} has {len(tokens)} tokens, fewer than tokens={config.tokens}")
    return tokens


def make_model(config: CheckConfig) -> LanguageModel:
    """Random weights, as numpy arrays, which go wherever the mesh is."""
    model = LanguageModel(
        LanguageModelConfig(
            name="language",
            vocabulary_size=ByteTokenizer.vocabulary_size,
            tied_embedding=False,
            embedding_scale=1.0,
            trained_positions=0,
            transformer=config.transformer,
        ),
        rngs=nnx.Rngs(config.seed),
    )
    model.vocabulary.head[...] = model.vocabulary.head[...] * config.head_gain
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_get(state))


def check(config: CheckConfig) -> None:
    """Reads the document by both rules on every ring, and reports the differences."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(max(config.ring_sizes))
    tokens, model = document_tokens(config), make_model(config)
    began = time.perf_counter()
    expected = {
        "truncated": plain_losses(model, tokens, progress=True),
        "sliding": plain_sliding_losses(model, tokens, window=config.window, stride=config.stride),
    }
    plain_seconds = time.perf_counter() - began
    rows = []
    for ring_size in config.ring_sizes:
        parallel = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=ring_size)), layout=config.layout)
        options = {"parallel": parallel, "chunks": config.chunks, "batch_size": 1}
        for rule in ("truncated", "sliding"):
            began = time.perf_counter()
            if rule == "truncated":
                (losses,) = truncated_losses(model, [tokens], length=len(tokens), **options)
            else:
                losses = sliding_losses(model, tokens, window=config.window, stride=config.stride, **options)
            rows.append(
                {
                    "rule": rule,
                    "ring_size": ring_size,
                    "tokens": len(losses),
                    "perplexity": Perplexity.of(losses).value,
                    "plain_perplexity": float(np.exp(expected[rule].mean())),
                    "largest_difference": float(np.abs(losses - expected[rule]).max()),
                    "seconds": time.perf_counter() - began,
                }
            )
    config.output.mkdir(parents=True, exist_ok=True)
    summary = {
        "rows": rows,
        "plain_seconds": plain_seconds,
        "config": to_mapping(config),
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax", "numpy"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    table = Table("rule", "ring", "tokens", "perplexity", "plain", "largest difference of a token, nats")
    for row in rows:
        figures = (f"{row['perplexity']:.6f}", f"{row['plain_perplexity']:.6f}", f"{row['largest_difference']:.1e}")
        table.add_row(row["rule"], str(row["ring_size"]), f"{row['tokens']:,}", *figures)
    Console().print(table)
    largest = max(row["largest_difference"] for row in rows)
    agrees = str(largest <= config.tolerance).lower()
    print(f"largest_difference={largest:.3g} tolerance={config.tolerance:.3g} agrees={agrees}")
    if largest > config.tolerance:
        raise ValueError(f"a token's loss differs by {largest:.3g} nats, more than tolerance={config.tolerance}")


@hydra.main(config_path="../conf", config_name="check_perplexity", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a check."""
    with exit_on_bad_input():
        check(from_mapping(CheckConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
