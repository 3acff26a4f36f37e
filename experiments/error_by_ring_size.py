"""Errors of attention against the size of the ring; conf/error_by_ring_size.yaml documents every key."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.progress import Progress

from ring_rl.atomic_file import atomic_file, refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels import CAUSAL, Layout, attention, inverse_permutation, permutation, reference_attention
from ring_rl.kernels.layout import check_length
from ring_rl.kernels.local.block import LocalName
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.typing import Array, Float

OUTPUTS = ("errors.csv", "error.png", "summary.json")
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorConfig:
    """What is computed, for which rings."""

    ring_sizes: tuple[int, ...]
    layouts: tuple[Layout, ...]
    dtypes: tuple[DType, ...]
    seeds: int
    batch: int
    tokens: int
    heads: int
    head_dim: int
    local_block: LocalName
    block_size: int | None
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if 1 not in self.ring_sizes:
            raise ValueError(f"ring_sizes must hold 1, which growth is measured from, got {list(self.ring_sizes)}")
        for layout in self.layouts:
            for ring_size in self.ring_sizes:
                check_length(self.tokens, ring_size=ring_size, layout=layout)


class Results(NamedTuple):
    """Attention and its gradients, in natural order of the tokens."""

    out: Float[Array | np.ndarray, "B T H D"]
    log_sum_exp: Float[Array | np.ndarray, "B H T"]
    dq: Float[Array | np.ndarray, "B T H D"]
    dk: Float[Array | np.ndarray, "B T H D"]
    dv: Float[Array | np.ndarray, "B T H D"]


TOKEN_AXES = {"out": 1, "log_sum_exp": 2, "dq": 1, "dk": 1, "dv": 1}


class Row(NamedTuple):
    """One line of errors.csv. `layout` "naive" is the dense formula in the same dtype, without a ring."""

    dtype: str
    layout: str
    ring_size: int
    seed: int
    quantity: str
    max_error: float
    rms_error: float


def make_inputs(config: ErrorConfig, dtype: DType, seed: int) -> list[Float[Array, "B T H D"]]:
    """q, k, v, d_out: standard normal, rounded to `dtype`, so that all that is compared starts from one input."""
    shape = (config.batch, config.tokens, config.heads, config.head_dim)
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape, dtype=np.float32), dtype) for _ in range(4)]


def dense(q, k, v, d_out) -> Results:
    """The formula, in the dtype of its inputs."""
    (out, log_sum_exp), pull_back = jax.vjp(partial(reference_attention, mask=CAUSAL), q, k, v)
    return Results(out, log_sum_exp, *pull_back((d_out, jnp.zeros_like(log_sum_exp))))


def on_virtual_ring(config: ErrorConfig, *, ring_size: int, layout: Layout) -> Callable[..., Results]:
    """Attention over a ring of that size, all of whose devices are this one; arguments as for `dense`."""
    order = permutation(config.tokens, ring_size=ring_size, layout=layout)
    inverse = inverse_permutation(config.tokens, ring_size=ring_size, layout=layout)

    def one_device(q, k, v, d_out):
        call = partial(
            attention,
            mask=CAUSAL,
            axis_name="ring",
            layout=layout,
            strategy="ring",
            local=config.local_block,
            block_size=config.block_size,
        )
        (out, log_sum_exp), pull_back = jax.vjp(lambda q, k, v: tuple(call(q, k, v)), q, k, v)
        return out, log_sum_exp, *pull_back((d_out, jnp.zeros_like(log_sum_exp)))

    def whole(q, k, v, d_out):
        shards = (x[:, order].reshape(x.shape[0], ring_size, -1, *x.shape[2:]) for x in (q, k, v, d_out))
        results = jax.vmap(one_device, in_axes=1, out_axes=tuple(TOKEN_AXES.values()), axis_name="ring")(*shards)
        joined = (
            x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]).take(inverse, axis=axis)
            for x, axis in zip(results, TOKEN_AXES.values(), strict=True)
        )
        return Results(*joined)

    return whole


def compare(results: Results, exact: Results) -> Iterator[tuple[str, float, float]]:
    """For each quantity max |a - b| / max |b|, and the root of mean (a - b)² / mean b²."""
    for name, a, b in zip(Results._fields, results, exact, strict=True):
        b = np.asarray(b, np.float64)
        difference = np.asarray(a, np.float64) - b
        yield (
            name,
            float(np.max(np.abs(difference)) / np.max(np.abs(b))),
            float(np.sqrt(np.mean(difference**2) / np.mean(b**2))),
        )


def measure_errors(config: ErrorConfig) -> list[Row]:
    """All rows, under a progress bar."""
    rows = []
    rings: list[tuple[Layout, int]] = [(layout, size) for layout in config.layouts for size in config.ring_sizes]
    computed: dict[tuple[str, int], Callable[..., Results]] = {
        ("naive", 1): dense,
        **{(layout, size): on_virtual_ring(config, ring_size=size, layout=layout) for layout, size in rings},
    }
    with Progress() as progress:
        bar = progress.add_task("comparing", total=len(config.dtypes) * config.seeds * len(computed))
        for dtype in config.dtypes:
            inputs = [make_inputs(config, dtype, seed) for seed in range(config.seeds)]
            with jax.enable_x64(True):
                exact = [jax.jit(dense)(*(x.astype(jnp.float64) for x in arrays)) for arrays in inputs]
                exact = [Results(*map(np.asarray, results)) for results in exact]
            for (layout, ring_size), compute in computed.items():
                compiled = jax.jit(compute)
                for seed in range(config.seeds):
                    progress.update(bar, description=f"{dtype} {layout} ring of {ring_size}")
                    for error in compare(compiled(*inputs[seed]), exact[seed]):
                        rows.append(Row(dtype, layout, ring_size, seed, *error))
                    progress.advance(bar)
    return rows


def mean_error(rows: list[Row], **wanted: str | int) -> dict[str, float]:
    """Means over the seeds of `max_error` and `rms_error` of the rows whose fields are those wanted."""
    chosen = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return {name: float(np.mean([getattr(row, name) for row in chosen])) for name in ("max_error", "rms_error")}


def growth(config: ErrorConfig, rows: list[Row], dtype: DType) -> dict[str, float]:
    """For each quantity and kind of error: the largest over all rings, divided by that of a ring of 1."""
    found = {}
    for quantity in Results._fields:
        for kind in ("max_error", "rms_error"):
            by_layout = []
            for layout in config.layouts:
                errors = {
                    size: mean_error(rows, dtype=dtype, layout=layout, ring_size=size, quantity=quantity)[kind]
                    for size in config.ring_sizes
                }
                by_layout.append(max(errors.values()) / errors[1])
            found[f"{quantity} {kind}"] = max(by_layout)
    return found


def draw(config: ErrorConfig, rows: list[Row]) -> Figure:
    """A panel a dtype and quantity: errors of each layout, and the naive one dashed."""
    columns = len(Results._fields)
    figure = Figure(figsize=(2.6 * columns, 2.6 * len(config.dtypes)), layout="constrained")
    panels = figure.subplots(len(config.dtypes), columns, squeeze=False)
    for dtype, line in zip(config.dtypes, panels, strict=True):
        for quantity, axes in zip(Results._fields, line, strict=True):
            for layout in config.layouts:
                errors = [
                    mean_error(rows, dtype=dtype, layout=layout, ring_size=size, quantity=quantity)["rms_error"]
                    for size in config.ring_sizes
                ]
                axes.plot(config.ring_sizes, errors, marker="o", markersize=3, label=layout)
            naive = mean_error(rows, dtype=dtype, layout="naive", quantity=quantity)["rms_error"]
            axes.axhline(naive, color="0.4", linestyle="--", label=f"dense {dtype}")
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
            axes.set_xticks(config.ring_sizes, [str(size) for size in config.ring_sizes])
            axes.set_title(f"{quantity}, {dtype}", fontsize=9)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("relative RMS error")
    for axes in panels[-1]:
        axes.set_xlabel("ring size")
    panels[0, 0].legend(fontsize=7)
    return figure


def measure(config: ErrorConfig) -> None:
    """Measures, writes and prints by how much errors grow at most."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    rows = measure_errors(config)
    growths = {dtype: growth(config, rows, dtype) for dtype in config.dtypes}
    config.output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([Row._fields, *([*row[:-2], *(f"{x:.6e}" for x in row[-2:])] for row in rows)])
    write_whole(config.output / "errors.csv", text.getvalue())
    with atomic_file(config.output / "error.png", overwrite=True) as temporary:
        draw(config, rows).savefig(temporary, dpi=130)
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib"),
        "growth": growths,
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"results {config.output}")
    print(" ".join(f"max_growth_{dtype}={max(of.values()):.2f}" for dtype, of in growths.items()))


@hydra.main(config_path="../conf", config_name="error_by_ring_size", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(ErrorConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
