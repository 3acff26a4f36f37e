"""The planner's count of time beside measured and published figures; conf/check_roofline.yaml documents every key."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.hardware import HARDWARE
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.nn.transformer import TransformerConfig
from ring_rl.planning.compiled_step import StepRequest
from ring_rl.planning.rates import Cluster, Rates
from ring_rl.planning.roofline import layer_attention_flops, roofline
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.training.mesh import MeshConfig
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.provenance import git_commit
from ring_rl.training.tables import csv_table, markdown_table

OUTPUTS = ("attention.csv", "attention.md", "published.csv", "published.md", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A figure that others reported of a training, and the training.

    Attributes:
        transformer: The model.
        hardware: An entry of `HARDWARE`, inside a node if there are several.
        between_nodes: Another, of the links between nodes of 8; None: all devices are joined alike.
        mesh: Devices along each axis.
        context: Tokens of a sequence.
        batch_size: Sequences of a microbatch.
        microbatches: Of a step.
        saved_activations: As was trained, as far as known.
        utilisation: Model FLOPs utilisation, lowest and highest.
        source: Where the figure is from, and what of the setup is assumed.
    """

    transformer: TransformerConfig
    hardware: str
    between_nodes: str | None
    mesh: MeshConfig
    context: int
    batch_size: int
    microbatches: int
    saved_activations: SavedActivations
    utilisation: tuple[float, float]
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is compared."""

    timings: Path
    fitted_tokens: int
    transformer: TransformerConfig
    optimizer: OptimizerConfig
    vocabulary_size: int
    trainings: dict[str, Published]
    rates: Rates
    output: Path
    overwrite: bool


def attention_rows(
    config: CheckConfig, cases: list[Mapping[str, Any]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(the one rate of each local block, a record a case): seconds as counted at that rate beside seconds as measured.

    A rate is that of the least largest error over the block's causal cases of `fitted_tokens`; a virtual ring has no
    other devices than the one, so that all their operations count.

    Raises:
        ValueError: A block has no case to fit its rate to.
    """
    ours = [case for case in cases if case["implementation"] == "ring_rl" and case["document_lengths"] is None]
    records = []
    for case in ours:
        flops = layer_attention_flops(attention_step(config, case)).total
        seconds = statistics.median(case["forward_backward_seconds"])
        fitted = case["mask"] == "causal" and case["tokens"] == config.fitted_tokens
        record = {"case": case["name"], "local_block": case["local"], "fitted": fitted}
        records.append({**record, "flops": flops, "measured_seconds": seconds})
    rates = {block: _rate(config, block, records) for block in dict.fromkeys(row["local_block"] for row in records)}
    for record in records:
        record["counted_seconds"] = record["flops"] / rates[record["local_block"]]
        record["error"] = record["counted_seconds"] / record["measured_seconds"] - 1
    return rates, records


def _rate(config: CheckConfig, block: str, records: list[dict[str, Any]]) -> float:
    fitted = (record for record in records if record["fitted"] and record["local_block"] == block)
    reached = [record["flops"] / record["measured_seconds"] for record in fitted]
    if not reached:
        raise ValueError(
            f"{config.timings} has no causal case of {config.fitted_tokens} tokens with the local block {block}; "
            "set fitted_tokens, or measure one"
        )
    return (min(reached) + max(reached)) / 2


def attention_step(config: CheckConfig, case: Mapping[str, Any]) -> StepSizes:
    """A layer with the attention of a measured case; devices share it as they did."""
    heads, head_dim = case["heads"], case["head_dim"]
    transformer = dataclasses.replace(
        config.transformer,
        layers=1,
        width=heads * head_dim,
        query_heads=heads,
        key_value_heads=heads,
        head_dim=head_dim,
        attention_window=case["window"],
        feed_forward="none",
        saved_activations="attention",
        compute_dtype=case["dtype"],
    )
    devices = case["ring_size"] * case["ulysses_size"]
    mesh = MeshConfig(dp=1, fsdp=1, tp=1, sp=devices)
    strategy = "ring" if case["strategy"] == "blockwise" else case["strategy"]
    hybrid = case["ulysses_size"] if strategy == "hybrid" else 1
    step = {"layout": case["layout"], "strategy": strategy, "ulysses_size": hybrid}
    return StepSizes(_request(config, transformer, mesh, context=case["tokens"], batch_size=case["batch"], **step))


def published_rows(config: CheckConfig) -> list[dict[str, Any]]:
    """A record a published figure: planned utilisation with gathers that hide behind nothing, and behind products."""
    records = []
    for name, report in config.trainings.items():
        transformer = dataclasses.replace(report.transformer, saved_activations=report.saved_activations)
        step = {"layout": "zigzag", "strategy": "ring", "ulysses_size": 1}
        context, batch_size = report.context, report.batch_size
        request = _request(config, transformer, report.mesh, context=context, batch_size=batch_size, **step)
        sizes = StepSizes(request, microbatches=report.microbatches)
        between = None if report.between_nodes is None else HARDWARE[report.between_nodes]
        nodes = {} if between is None else {"node_devices": 8, "between_nodes": between}
        cluster = Cluster(device=HARDWARE[report.hardware], **nodes)
        exposed, hidden = (
            roofline(sizes, cluster=cluster, rates=dataclasses.replace(config.rates, gathers_overlap=overlap))
            for overlap in (False, True)
        )
        records.append(
            {
                "training": name,
                "devices": sizes.devices,
                "published_low": report.utilisation[0],
                "published_high": report.utilisation[1],
                "planned": exposed.utilisation,
                "planned_gathers_hidden": hidden.utilisation,
                "tokens_per_second_a_device": exposed.tokens_per_second / sizes.devices,
                "source": report.source,
            }
        )
    return records


def _request(config: CheckConfig, transformer: TransformerConfig, mesh: MeshConfig, **step: Any) -> StepRequest:
    return StepRequest(
        model=LanguageModelConfig(
            name="language",
            vocabulary_size=config.vocabulary_size,
            tied_embedding=False,
            embedding_scale=0.02,
            trained_positions=0,
            transformer=transformer,
        ),
        mesh=mesh,
        weights_over_ring=mesh.sp > 1,
        loss_chunks=1,
        optimizer=config.optimizer,
        attention_block="auto",
        heads_at_once=None,
        **step,
    )


def as_text(attention: list[dict[str, Any]], published: list[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Both tables as a header and lines."""
    tables = {
        "attention": [["case", "local block", "measured s", "counted s", "error", "gives the rate"]],
        "published": [["training", "published MFU", "planned", "with gathers hidden", "source"]],
    }
    for row in attention:
        seconds = (f"{row[f'{kind}_seconds']:.3g}" for kind in ("measured", "counted"))
        names = (row["case"], row["local_block"])
        tables["attention"].append([*names, *seconds, f"{row['error']:+.0%}", "yes" if row["fitted"] else ""])
    for row in published:
        low, high = (f"{row[f'published_{end}']:.0%}" for end in ("low", "high"))
        planned = (f"{row[name]:.0%}" for name in ("planned", "planned_gathers_hidden"))
        tables["published"].append(
            [row["training"], low if low == high else f"{low} to {high}", *planned, row["source"]]
        )
    return tables


def check(config: CheckConfig) -> str:
    """Tables written and shown; the line for programs."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    if not config.timings.is_file():
        raise ValueError(f"no timings at {config.timings}; experiments/bench_kernels.py writes results.json")
    measured = json.loads(config.timings.read_text())
    rates, attention = attention_rows(config, measured["cases"])
    published = published_rows(config)
    config.output.mkdir(parents=True, exist_ok=True)
    texts = as_text(attention, published)
    for name, records in (("attention", attention), ("published", published)):
        write_whole(config.output / f"{name}.csv", csv_table(records))
        write_whole(config.output / f"{name}.md", markdown_table(texts[name]))
        table = Table(*texts[name][0])
        for line in texts[name][1:]:
            table.add_row(*line)
        Console(width=max(140, Console().width)).print(table)
    worst = max(abs(record["error"]) for record in attention if record["fitted"])
    summary = {
        "flops_per_second": rates,
        "largest_error": worst,
        "timings_commit": measured["commit"],
        "timings_device": measured["device"],
        "config": {**to_mapping(config), "output": str(config.output), "timings": str(config.timings)},
        "commit": git_commit(),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    reached = " ".join(f"gflops_per_second_{block}={rate / 1e9:.1f}" for block, rate in rates.items())
    return f"{reached} largest_error={worst:.3f} published={len(published)}"


@hydra.main(config_path="../conf", config_name="check_roofline", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a comparison."""
    with exit_on_bad_input():
        print(check(from_mapping(CheckConfig, resolve(cfg))))


if __name__ == "__main__":
    run_entry_point(main)
