"""What `experiments/plan.py` says of the meshes it judged: rows of tables, records of a file, a line for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ring_rl.planning.rates import Cluster, Rates
from ring_rl.planning.ring_phases import RingPhases
from ring_rl.planning.ring_timeline import Timeline
from ring_rl.planning.roofline import days_for
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.planning.suggest import Suggestion, Suggestions
from ring_rl.planning.topology import Machine
from ring_rl.training.mesh import MeshConfig

__all__ = [
    "assumptions",
    "attention_text",
    "axes_text",
    "fact_rows",
    "figures_line",
    "mesh_records",
    "mesh_rows",
]

_GIB = 2**30


def axes_text(mesh: MeshConfig) -> str:
    """The axes of more than one device."""
    return " x ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1) or "1 device"


def attention_text(sizes: StepSizes) -> str:
    """How the devices that share a sequence meet."""
    if sizes.attention_strategy == "hybrid":
        return f"ring of {sizes.ring_size} x ulysses of {sizes.exchange_size}"
    return "blockwise" if sizes.mesh.sp == 1 else f"{sizes.attention_strategy} of {sizes.mesh.sp}"


def mesh_rows(found: Suggestions, shown: int) -> list[list[str]]:
    """The header and a line a mesh, as text: those that fit, then what is nearest to fitting."""
    lines = [
        ["mesh", "attention", "saved", "weights over", "GiB a device", "s a step", "MFU", "ring waits", "reason"],
    ]
    for each in found.fitting[:shown]:
        sizes, time = each.sizes, each.time
        lines.append(
            [
                axes_text(sizes.mesh),
                attention_text(sizes),
                sizes.transformer.saved_activations,
                "fsdp x sp" if sizes.request.weights_over_ring else "fsdp",
                f"{each.memory.total / _GIB:.2f}",
                f"{time.seconds:.3g}",
                f"{time.utilisation:.0%}",
                {None: "", True: "no", False: f"{time.waiting_seconds:.3g} s"}[time.hides],
                "fits",
            ]
        )
    for refusal in found.refused[: max(shown - len(found.fitting), 3)]:
        size = "" if refusal.memory is None else f"{refusal.memory.total / _GIB:.2f}"
        lines.append([axes_text(refusal.mesh), refusal.strategy, "", "", size, "", "", "", refusal.reason])
    return lines


def mesh_records(found: Suggestions) -> list[dict[str, Any]]:
    """A record a mesh that fits, the fastest first."""
    return [
        {
            **dataclasses.asdict(each.sizes.mesh),
            "attention": attention_text(each.sizes),
            "saved_activations": each.sizes.transformer.saved_activations,
            "weights_over_ring": each.sizes.request.weights_over_ring,
            "heads_at_once": each.sizes.request.heads_at_once,
            "context": each.sizes.request.context,
            "bytes": each.memory.total,
            "seconds": each.time.seconds,
            "mfu": each.time.utilisation,
        }
        for each in found.fitting
    ]


def fact_rows(
    best: Suggestion, *, estimated: bool, token_budget: float, timelines: Mapping[str, Timeline]
) -> list[tuple[str, str]]:
    """What is known of one mesh, name and value."""
    sizes, time, memory = best.sizes, best.time, best.memory
    facts = [
        ("parameters", f"{sizes.parameters():,}"),
        ("context", f"{sizes.request.context:,} tokens, {sizes.request.context // sizes.mesh.sp:,} of it a device"),
        (
            "a step",
            f"{sizes.step_tokens:,} tokens, {sizes.request.batch_size} sequences at a time, {sizes.microbatches} times",
        ),
    ]
    facts += [(f"memory: {name}", f"{size / _GIB:.3f} GiB") for name, size in memory.parts.items()]
    facts.append(
        (
            f"memory: peak{' (estimate)' if estimated else ''}",
            f"{memory.total / _GIB:.3f} GiB, during {memory.moment}",
        )
    )
    facts += [(f"time: {name}", f"{seconds:.3g} s") for name, seconds in time.parts().items()]
    facts += [
        ("time: a step", f"{time.seconds:.3g} s, {time.tokens_per_second:,.0f} tokens/s"),
        ("model FLOPs a step", f"{time.model_flops:.3e}, {time.utilisation:.1%} of the devices' peak"),
        ("FLOPs a device", f"{time.product_flops:.3e} products, {time.attention_flops:.3e} attention"),
    ]
    if time.forward is not None and time.backward is not None and time.hop_bytes is not None:
        facts += [
            ("rings a layer", f"{time.rings}, one after another" if time.rings > 1 else "1"),
            ("bytes a hop", f"{time.hop_bytes.forward:,} forward, {time.hop_bytes.backward:,} backward"),
            (
                "every hop hides",
                f"{'yes' if time.hides else 'no'}: at the tightest {_behind(time.forward)} forward, "
                f"{_behind(time.backward)} backward",
            ),
        ]
    facts.append((f"days for {token_budget:.3g} tokens", f"{days_for(token_budget, time):,.2f}"))
    of = "a layer's ring" if time.rings == 1 else f"one of a layer's {time.rings} rings"
    for title, timeline in timelines.items():
        facts.append((f"{of}, {title}", f"{1e3 * timeline.seconds:.3g} ms, {timeline.idle_share:.0%} idle"))
    return facts


def assumptions(cluster: Cluster, rates: Rates) -> str:
    """What the times stand on, in a paragraph."""
    device, between = cluster.device, cluster.between_nodes
    nodes = ""
    if between is not None:
        speed = f"{between.neighbour_bytes_per_second:.3g}"
        nodes = f"; between nodes of {cluster.node_devices} {speed} bytes/s ({between.name})"
    return (
        f"Assumed: {device.name}, {device.flops_per_second:.3g} FLOP/s, of which products reach "
        f"{rates.products_share:.0%} and attention {rates.attention_share:.0%}; "
        f"{device.neighbour_bytes_per_second:.3g} bytes/s to a neighbour{nodes}, of which {rates.link_share:.0%}, and "
        f"{1e6 * rates.hop_latency_seconds:.3g} us a hop; gathers hide behind "
        f"{'products' if rates.gathers_overlap else 'nothing'}. {device.source}."
    )


def figures_line(best: Suggestion, machine: Machine, *, token_budget: float, timelines: Mapping[str, Timeline]) -> str:
    """name=value, for programs."""
    sizes, time = best.sizes, best.time
    heads = sizes.request.heads_at_once
    figures = [
        *(f"{axis}={size}" for axis, size in dataclasses.asdict(sizes.mesh).items()),
        f"strategy={sizes.attention_strategy}",
        f"saved_activations={sizes.transformer.saved_activations}",
        f"heads_at_once={'all' if heads is None else heads}",
        f"memory_gib={best.memory.total / _GIB:.3f}",
        f"available_gib={machine.memory_bytes / _GIB:.3f}",
        f"step_seconds={time.seconds:.4g}",
        f"mfu={time.utilisation:.3f}",
        f"days={days_for(token_budget, time):.4g}",
        f"hop_hides={'none' if time.hides is None else str(time.hides).lower()}",
    ]
    if timelines:
        even = timelines["forward, all alike"].seconds
        figures.append(f"slow_device_factor={timelines['forward, slow devices'].seconds / even:.3f}")
        figures.append(f"slow_link_factor={timelines['forward, slow links'].seconds / even:.3f}")
    return " ".join(figures)


def _behind(phases: RingPhases) -> str:
    transfer, block = phases.tightest
    return f"{1e3 * transfer:.3g} ms behind {1e3 * block:.3g}"
