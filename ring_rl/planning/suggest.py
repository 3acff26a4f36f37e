"""Which meshes a model, a context and a number of devices allow, the fastest that fit first.

Tried are all products dp x fsdp x tp x sp of the devices; over sp a ring, Ulysses and every hybrid of the two; weights
over the ring or not; and the policies of saved activations asked for. Memory is `memory_model`'s and time is
`roofline`'s: both are estimates, so compile what is chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from ring_rl.kernels.layout import padded_length
from ring_rl.nn.parallel import SequenceStrategy
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.planning.compiled_step import StepRequest
from ring_rl.planning.memory_model import Compiler, StepMemory, step_memory
from ring_rl.planning.rates import Cluster, Rates
from ring_rl.planning.roofline import Roofline, roofline
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.training.mesh import MeshConfig

__all__ = [
    "Constraints",
    "Refusal",
    "Suggestion",
    "Suggestions",
    "candidates",
    "fewest_devices",
    "suggest",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a mesh must be; None is anything.

    Attributes:
        dp: Size of the axis, and so the next three.
        fsdp: As above.
        tp: As above.
        sp: As above.
        strategy: How the devices that share a sequence meet.
    """

    dp: int | None
    fsdp: int | None
    tp: int | None
    sp: int | None
    strategy: Literal["ring", "ulysses", "hybrid"] | None

    def __str__(self) -> str:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return ", ".join(f"{name}={value}" for name, value in given.items())

    def allow(self, mesh: MeshConfig, strategy: str) -> bool:
        """Whether it is so."""
        wanted = ((self.dp, mesh.dp), (self.fsdp, mesh.fsdp), (self.tp, mesh.tp), (self.sp, mesh.sp))
        return all(size in (None, given) for size, given in wanted) and self.strategy in (None, strategy)


_FLOAT32_BYTES = 4
# Of the memory, by microbatches of more than one sequence a group: the formula is as exact as this leaves free.
_MEMORY_TO_FILL = 0.9
# Tokens that a context may be padded by, as a multiple of it: beyond, other chunks serve better.
_MOST_PADDING = 1.25

ANY_MESH = Constraints(dp=None, fsdp=None, tp=None, sp=None, strategy=None)


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A mesh that fits, with what it needs and how long a step takes."""

    sizes: StepSizes
    memory: StepMemory
    time: Roofline


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A mesh that does not do.

    Attributes:
        mesh: Its axes.
        strategy: How shards of a sequence would have met.
        reason: Why not, in a line.
        memory: What it would need; None where it cannot be built at all.
    """

    mesh: MeshConfig
    strategy: str
    reason: str
    memory: StepMemory | None


@dataclasses.dataclass(frozen=True)
class Suggestions:
    """What was found.

    Attributes:
        fitting: By step time, the fastest first.
        refused: All others; those that need least memory first, then those that cannot be built.
    """

    fitting: list[Suggestion]
    refused: list[Refusal]


def suggest(
    request: StepRequest,
    *,
    devices: int,
    batch_tokens: int,
    cluster: Cluster,
    memory_bytes: float,
    rates: Rates,
    policies: tuple[SavedActivations, ...],
    compiler: Compiler,
    constraints: Constraints = ANY_MESH,
) -> Suggestions:
    """All meshes of `devices` devices, judged.

    Args:
        request: The step; its mesh, strategy, Ulysses size, place of weights, batch and saved activations are replaced.
        devices: How many there are; all are used.
        batch_tokens: Tokens of an optimizer step, over all devices. They are taken in as few microbatches as leave a
            tenth of the memory free, and where not even one sequence a group of devices does, in those.
        cluster: Peaks of a device and its links.
        memory_bytes: Of a device.
        rates: What is reached of those peaks.
        policies: Saved activations to try.
        compiler: Whose memory is foretold.
        constraints: What a mesh must be.

    Raises:
        ValueError: The batch holds no sequence, or no mesh meets the constraints.
    """
    sequences = _sequences(request, batch_tokens)
    fitting: list[Suggestion] = []
    refused: list[Refusal] = []
    for mesh, strategy, make in candidates(
        request, devices=devices, sequences=sequences, policies=policies, constraints=constraints
    ):
        try:
            sizes = make(1)
        except ValueError as error:
            refused.append(Refusal(mesh, strategy, str(error), None))
            continue
        memory = step_memory(sizes, compiler=compiler)
        if memory.total > memory_bytes:
            largest = max(memory.parts, key=lambda part: memory.parts[part])
            reason = (
                f"needs {memory.total / 2**30:.1f} of {memory_bytes / 2**30:.1f} GiB, most of it for {largest} "
                f"({memory.parts[largest] / 2**30:.1f} GiB)"
            )
            refused.append(Refusal(mesh, strategy, reason, memory))
            continue
        # Fewer microbatches gather and sum less often, and do the same otherwise.
        for rows in _divisors(sizes.microbatches)[1:]:
            larger = make(rows)
            needed = step_memory(larger, compiler=compiler)
            if needed.total > _MEMORY_TO_FILL * memory_bytes:
                break
            sizes, memory = larger, needed
        fitting.append(Suggestion(sizes, memory, roofline(sizes, cluster=cluster, rates=rates)))
    if not fitting and not refused:
        asked = f" has {constraints}" if str(constraints) else " serves"
        heads = request.model.transformer.key_value_heads
        raise ValueError(
            f"no mesh of {devices} devices{asked}: dp x fsdp x tp x sp must be {devices}, dp x fsdp at most the "
            f"{sequences} sequences of a step and tp a divisor of the {heads} key-value heads"
        )
    # Of equals the one that leaves more memory.
    fitting.sort(key=lambda each: (each.time.seconds, each.memory.total))
    refused.sort(key=lambda each: (each.memory is None, 0 if each.memory is None else each.memory.total))
    return Suggestions(fitting, refused)


def fewest_devices(
    request: StepRequest,
    *,
    counts: Sequence[int],
    batch_tokens: int,
    memory_bytes: float,
    policies: tuple[SavedActivations, ...],
    compiler: Compiler,
    constraints: Constraints = ANY_MESH,
) -> StepSizes | None:
    """The mesh of least memory of the first of these numbers of devices that holds the step; None where none does."""
    sequences = _sequences(request, batch_tokens)
    for devices in counts:
        best: tuple[int, StepSizes] | None = None
        for _, _, make in candidates(
            request, devices=devices, sequences=sequences, policies=policies, constraints=constraints
        ):
            try:
                sizes = make(1)
            except ValueError:
                continue
            if _FLOAT32_BYTES * (1 + sizes.moments) * sizes.parameters() > devices * memory_bytes:
                # Parameters and moments alone are too much, however they are shared.
                break
            total = step_memory(sizes, compiler=compiler).total
            if total <= memory_bytes and (best is None or total < best[0]):
                best = total, sizes
        if best is not None:
            return best[1]
    return None


def candidates(
    request: StepRequest,
    *,
    devices: int,
    sequences: int,
    policies: tuple[SavedActivations, ...],
    constraints: Constraints = ANY_MESH,
) -> Iterator[tuple[MeshConfig, str, Callable[[int], StepSizes]]]:
    """(mesh, strategy in words, what makes its sizes or raises ValueError) of every mesh worth judging.

    The last takes the sequences of a microbatch that each group of devices has.

    Tensor parallelism beyond the key-value heads, and more groups of devices than the batch has sequences, are not
    tried: no model can be cut so.
    """
    heads = request.model.transformer.key_value_heads
    for tp in _divisors(devices):
        if heads % tp:
            continue
        for sp in _divisors(devices // tp):
            groups = devices // tp // sp
            if groups > sequences:
                continue
            for fsdp in _divisors(groups):
                mesh = MeshConfig(dp=groups // fsdp, fsdp=fsdp, tp=tp, sp=sp)
                for strategy, ulysses_size in _strategies(sp):
                    if not constraints.allow(mesh, strategy):
                        continue
                    for over_ring in (False, True) if sp > 1 else (False,):
                        for policy in policies:
                            words = f"{strategy} {sp // ulysses_size}x{ulysses_size}" if ulysses_size > 1 else strategy
                            yield (
                                mesh,
                                words if sp > 1 else "blockwise",
                                _maker(request, mesh, strategy, ulysses_size, over_ring, policy, sequences),
                            )


def _maker(
    request: StepRequest,
    mesh: MeshConfig,
    strategy: SequenceStrategy,
    ulysses_size: int,
    over_ring: bool,
    policy: SavedActivations,
    sequences: int,
) -> Callable[[int], StepSizes]:
    def make(rows: int) -> StepSizes:
        groups = mesh.dp * mesh.fsdp
        if sequences % groups:
            raise ValueError(
                f"a batch of {sequences} sequences cannot be shared by {groups} groups of devices; use a multiple"
            )
        transformer = dataclasses.replace(request.model.transformer, saved_activations=policy)
        changed = dataclasses.replace(
            request,
            model=dataclasses.replace(request.model, transformer=transformer),
            mesh=mesh,
            strategy=strategy,
            ulysses_size=ulysses_size,
            weights_over_ring=over_ring,
            context=_padded(request, mesh.sp),
            batch_size=groups * rows,
        )
        return StepSizes(changed, microbatches=sequences // groups // rows)

    return make


def _padded(request: StepRequest, sp: int) -> int:
    """The context, lengthened to what the devices divide, and the chunks of feed-forward and loss divide of a device.

    Raises:
        ValueError: That would be much more than asked for.
    """
    config = request.model.transformer
    chunks = math.lcm(request.loss_chunks, 1 if config.feed_forward == "none" else config.feed_forward_chunks)
    multiple = math.lcm(padded_length(1, ring_size=sp, layout=request.layout), sp * chunks)
    padded = -(-request.context // multiple) * multiple
    if padded > _MOST_PADDING * request.context:
        raise ValueError(
            f"{request.context:,} tokens would be padded to {padded:,} for sp={sp} and {chunks} chunks on each device; "
            "use fewer devices a sequence, loss_chunks or feed_forward_chunks"
        )
    return padded


def _sequences(request: StepRequest, batch_tokens: int) -> int:
    sequences = batch_tokens // request.context
    if sequences < 1:
        raise ValueError(
            f"a batch of {batch_tokens:,} tokens holds no sequence of {request.context:,}; raise batch_tokens"
        )
    return sequences


def _strategies(sp: int) -> list[tuple[SequenceStrategy, int]]:
    if sp == 1:
        return [("ring", 1)]
    found: list[tuple[SequenceStrategy, int]] = [("ring", 1), ("ulysses", 1)]
    return found + [("hybrid", size) for size in _divisors(sp) if 1 < size < sp]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
