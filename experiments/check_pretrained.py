"""Whether a pretrained model computes here what it computes in transformers.

conf/check_pretrained.yaml documents every key.
"""

# torch and transformers are the yardstick of this script alone; nothing else needs them.
# pyright: reportMissingImports=false

import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.generate import GREEDY, Generator
from ring_rl.lm.load_model import GGUFSource, HuggingFaceSource, LoadedModel, load_model, smollm2_path
from ring_rl.lm.pretrained.safetensors_out import save_pretrained
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.typing import Float32, Int32

OUTPUT = "{name}.json"
SHARD_BYTES = 200_000_000
# Most likely tokens after a prompt that are written down, for others to compare with.
LISTED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Which model is asked what."""

    model: GGUFSource | HuggingFaceSource
    prompts: tuple[str, ...]
    new_tokens: int
    tolerance: float
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompts must name at least one text, and no empty one")
        if self.new_tokens < 1:
            raise ValueError(f"new_tokens must be at least 1, got {self.new_tokens}")
        if self.model.compute_dtype != "float32":
            raise ValueError(f"the check compares float32, got model.compute_dtype={self.model.compute_dtype}")


def model_path(source: GGUFSource | HuggingFaceSource) -> Path:
    """The file or folder that is compared."""
    return smollm2_path() if source.path is None else source.path


def result_name(path: Path) -> str:
    """Of a model's result: a file's name without its ending, a folder's whole name (Llama-3.2-1B ends in no suffix)."""
    path = path.absolute()
    return path.stem if path.suffix == ".gguf" else path.name


def in_transformers(path: Path) -> tuple[Any, Any]:
    """transformers' own model and tokenizer of these files, in float32.

    Raises:
        ImportError: transformers or torch is not installed.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the check compares with transformers, and {' and '.join(missing)} is not installed")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    if path.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name), dtype=torch.float32
    )
    # What `from_pretrained(gguf_file=...)` does, which asks for the package accelerate and then does not need it.
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    if left.unexpected_keys or left.missing_keys not in ([], ["lm_head.weight"]):
        raise ValueError(f"transformers reads another model in {path}: {left}")
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def their_logits(model: Any, ids: Int32[np.ndarray, " T"]) -> Float32[np.ndarray, "T V"]:
    """Logits after each token of a prompt."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids).long()[None]).logits[0].numpy()


def their_text(model: Any, ids: Int32[np.ndarray, " T"], *, count: int) -> tuple[list[int], float]:
    """Tokens written greedily, whatever they are, and the smallest lead that one had over the second best."""
    import torch

    written, lead, cache, now = [], float("inf"), None, torch.from_numpy(ids).long()[None]
    with torch.no_grad():
        for _ in range(count):
            out = model(now, past_key_values=cache, use_cache=True)
            best = out.logits[0, -1].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            cache, now = out.past_key_values, best.indices[:1][None]
            written.append(int(now))
    return written, lead


def our_logits(loaded: LoadedModel, parallel: SequenceParallel, longest: int) -> Any:
    """(ids) -> logits after each token; prompts are padded to one length, so that one program serves all."""
    graphdef, parameters = nnx.split(loaded.model)

    @jax.jit
    def forward(parameters, tokens):
        model = nnx.merge(graphdef, parameters)
        return model.logits(model.hidden(tokens, jnp.arange(longest)[None], parallel))

    def logits(ids: Int32[np.ndarray, " T"]) -> Float32[np.ndarray, "T V"]:
        padded = np.zeros((1, longest), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(parameters, padded))[0, : len(ids)]

    return logits


def compared(ours: Float32[np.ndarray, "T V"], theirs: Float32[np.ndarray, "T V"]) -> dict[str, Any]:
    """How far logits are apart."""
    log_softmax = lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True)  # noqa: E731
    p, q = log_softmax(theirs.astype(np.float64)), log_softmax(ours.astype(np.float64))
    return {
        "largest_logit": float(np.abs(theirs).max()),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_divergence": float((np.exp(p) * (p - q)).sum(axis=-1).max()),
        "same_most_likely_tokens": int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
    }


def best_of(logits: Float32[np.ndarray, " V"]) -> Int32[np.ndarray, " best"]:
    """The most likely tokens, best first."""
    return np.argsort(-logits, kind="stable")[:LISTED]


def differing_weights(loaded: LoadedModel, model: Any) -> list[str]:
    """Tensors that are others in transformers once this model was exported and read there again."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        save_pretrained(loaded.model, out, tokenizer=None, dtype="float32", shard_bytes=SHARD_BYTES)
        exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    original = model.state_dict()
    return sorted(
        name
        for name in original.keys() | exported.keys()
        if name not in exported or name not in original or not torch.equal(original[name], exported[name])
    )


def check(config: CheckConfig) -> bool:
    """Compares, prints, writes; whether everything agrees."""
    path = model_path(config.model)
    file = config.output / OUTPUT.format(name=result_name(path))
    if not config.overwrite:
        refuse_existing(config.output, [file.name])
    parallel = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1)), layout="contiguous")
    started = time.perf_counter()
    loaded = load_model(config.model, parallel)
    loading = time.perf_counter() - started
    tokenizer = loaded.named_tokenizer()
    config.output.mkdir(parents=True, exist_ok=True)
    model, their_tokenizer = in_transformers(path)
    ids = [tokenizer.encode(prompt) for prompt in config.prompts]
    logits = our_logits(loaded, parallel, max(map(len, ids)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("written by ring_rl", total=1 + len(ids))
        generation = Generator(loaded.model, parallel=None, chunk_size=max(map(len, ids)))(
            ids, max_new_tokens=config.new_tokens, sampling=GREEDY
        )
        progress.update(bar, advance=1, description="in transformers")
        for prompt, each, tokens in zip(config.prompts, ids, generation.tokens, strict=True):
            expected = their_logits(model, each)
            theirs, lead = their_text(model, each, count=config.new_tokens)
            agreeing = int(np.cumprod(np.equal(tokens, theirs)).sum())
            rows.append(
                {
                    "prompt": prompt,
                    "tokens": len(each),
                    "same_ids": each.tolist() == their_tokenizer(prompt, add_special_tokens=False)["input_ids"],
                    **compared(logits(each), expected),
                    "their_most_likely": [[int(token), float(expected[-1, token])] for token in best_of(expected[-1])],
                    "written": config.new_tokens,
                    "written_alike": agreeing,
                    "smallest_lead": lead,
                    "text": tokenizer.decode(tokens),
                    "their_text": their_tokenizer.decode(theirs, skip_special_tokens=True),
                }
            )
            progress.advance(bar)
    # Has a bar of its own.
    differing = differing_weights(loaded, model)
    agrees = not differing and all(
        row["same_ids"]
        and row["largest_difference"] <= config.tolerance
        and row["written_alike"] == config.new_tokens
        and row["text"] == row["their_text"]
        for row in rows
    )
    summary = {
        "model": path.name,
        "parameters": sum(each.size for each in jax.tree.leaves(nnx.state(loaded.model, nnx.Param))),
        "agrees": agrees,
        "tolerance": config.tolerance,
        "prompts": rows,
        "tensors_that_differ_after_export": differing,
        "loading_seconds": round(loading, 1),
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "flax", "gguf", "safetensors", "transformers", "torch"),
    }
    write_whole(file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    difference = max(row["largest_difference"] for row in rows)
    written = min(row["written_alike"] for row in rows)
    print(
        f"{path.name}: logits differ by at most {difference:.2g}, greedy text is the same for {written} of "
        f"{config.new_tokens} tokens, {len(differing)} tensors differ after an export: "
        f"{'all agrees' if agrees else 'NOT the same model'} ({file})"
    )
    return agrees


@hydra.main(config_path="../conf", config_name="check_pretrained", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a check."""
    with exit_on_bad_input():
        if not check(from_mapping(CheckConfig, resolve(cfg))):
            sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)
