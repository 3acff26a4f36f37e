"""Lets a language model go on with texts; conf/generate.yaml documents every key."""

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import jax
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.lm.evaluation.prompts import Prompter, TemplateConfig
from ring_rl.lm.generate import Generation, Generator, Sampling
from ring_rl.lm.generation.prompts import check_prompts
from ring_rl.lm.load_model import ModelSource, load_model, warn_beyond_trained_positions
from ring_rl.lm.tokenizer.protocol import Tokenizer, written_text
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh, request_virtual_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which model goes on with which texts, and how."""

    model: ModelSource
    template: TemplateConfig
    prompt: str | None
    prompts: Path | None
    output: Path | None
    max_new_tokens: int
    stop_at_end: bool
    sampling: Sampling
    seed: int
    rows: int
    chunk_size: int
    max_length: int | None
    cache_devices: int
    virtual_devices: int

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError('give either prompt="..." or prompts=<a file with {"prompt": ...} on each line>')
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1 prompt, got {self.rows}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLine:
    """A line of the file of prompts."""

    prompt: str


def texts_of(config: GenerateConfig) -> list[str]:
    """The prompts as they were given.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It holds no prompts, or a line that is none.
    """
    if config.prompts is None:
        return [config.prompt or ""]
    texts = []
    # Not splitlines, which would also cut at separators that may stand within a text.
    for number, line in enumerate(config.prompts.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            texts.append(from_mapping(PromptLine, json.loads(line)).prompt)
        except ValueError as error:
            raise ValueError(f'{config.prompts}, line {number} is no {{"prompt": ...}} ({error})') from None
    if not texts:
        raise ValueError(f"{config.prompts} is empty; it holds a prompt on each line")
    return texts


def generate_texts(config: GenerateConfig) -> None:
    """Writes after every prompt, a batch at a time; prints the texts, or appends them to a file."""
    texts = texts_of(config)
    if config.output is not None and config.output.exists():
        raise FileExistsError(f"{config.output} is there already; choose another output, or move it away")
    request_virtual_devices(config.virtual_devices)
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=config.cache_devices))
    parallel = SequenceParallel(mesh=mesh, layout="contiguous")
    loaded = load_model(config.model, parallel)
    tokenizer = loaded.named_tokenizer()
    prompter = Prompter(tokenizer, config.template)
    prompts = [prompter.ids(config.template.framed(text)) for text in texts]
    # All of them now: the last one may not fail when the others have taken an hour.
    check_prompts(
        prompts,
        vocabulary_size=loaded.config.vocabulary_size,
        max_new_tokens=config.max_new_tokens,
        max_length=config.max_length,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warn_beyond_trained_positions(loaded.config, max(map(len, prompts)) + config.max_new_tokens)
    generator = Generator(loaded.model, parallel=parallel, chunk_size=config.chunk_size)
    seconds, lines = time.perf_counter(), []
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.nullcontext() if config.output is None else config.output.open("x", encoding="utf-8") as file:
            for line in written_lines(config, generator, texts, prompts, tokenizer):
                lines.append(line)
                if file is not None:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
    finally:
        # Also what there is when Ctrl-C comes.
        if config.output is None:
            for line in lines:
                print(line["text"])
        elif not lines and config.output.exists() and not config.output.stat().st_size:
            # Nothing is lost with it, and it would be in the way of another try.
            config.output.unlink()
    tokens, stopped = (sum(line[name] for line in lines) for name in ("tokens", "stopped"))
    print(f"prompts={len(lines)} tokens={tokens} stopped={stopped} seconds={time.perf_counter() - seconds:.1f}")


def written_lines(
    config: GenerateConfig,
    generator: Generator,
    texts: Sequence[str],
    prompts: Sequence[np.ndarray],
    tokenizer: Tokenizer,
) -> Iterator[dict[str, Any]]:
    """What is written down of each prompt, with progress, as soon as its batch is done."""
    stops = (tokenizer.eos_id,) if config.stop_at_end and tokenizer.eos_id is not None else ()
    rows = min(config.rows, len(prompts))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("compiling", total=len(prompts))
        for batch, start in enumerate(range(0, len(prompts), rows)):
            chosen = prompts[start : start + rows]

            def advanced(done: int, total: int, start: int = start, count: int = len(chosen)) -> None:
                progress.update(bar, completed=start + count * done / total, description="writing")

            # A last, smaller batch is filled up with its last prompt, so that it is no program of its own.
            generation = generator(
                [*chosen, *[chosen[-1]] * (rows - len(chosen))],
                max_new_tokens=config.max_new_tokens,
                sampling=config.sampling,
                key=jax.random.fold_in(jax.random.key(config.seed), batch),
                stop_ids=stops,
                max_length=config.max_length,
                on_progress=advanced,
            )
            for row in range(len(chosen)):
                yield line_of(start + row, texts[start + row], generation, row, tokenizer)


def line_of(index: int, prompt: str, generation: Generation, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is written down of a prompt; its log-probability is the sum of those of the new tokens, in nats."""
    tokens = generation.tokens[row]
    return {
        "index": index,
        "prompt": prompt,
        "text": written_text(tokens, tokenizer),
        "tokens": len(tokens),
        "log_probability": float(np.sum(generation.log_probabilities[row], dtype=np.float64)),
        "stopped": generation.stopped[row],
    }


@hydra.main(config_path="../conf", config_name="generate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into texts."""
    with exit_on_bad_input():
        generate_texts(from_mapping(GenerateConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
