"""Which meshes a model, a context and a number of devices allow, the fastest that fit first.

Tried are all products dp x fsdp x tp x sp of the devices; over sp a ring, Ulysses and every hybrid of the two; weights
over the ring or not; and the policies of saved activations asked for. Memory is `memory_model`'s and time is
`roofline`'s: both are estimates, so compile what is chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from ring_rl.kernels.hardware import Hardware
from ring_rl.kernels.layout import padded_length
from ring_rl.nn.parallel import SequenceStrategy
from ring_rl.nn.saved_activations import SavedActivations
from ring_rl.planning.compiled_step import StepRequest
from ring_rl.planning.memory_model import Compiler, StepMemory, step_memory
from ring_rl.planning.roofline import Rates, Roofline, roofline
from ring_rl.planning.step_sizes import StepSizes
from ring_rl.training.mesh import MeshConfig

__all__ = [
    "Constraints",
    "MostDevices",
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

    def allow(self, mesh: MeshConfig, strategy: str) -> bool:
        """Whether it is so."""
        wanted = ((self.dp, mesh.dp), (self.fsdp, mesh.fsdp), (self.tp, mesh.tp), (self.sp, mesh.sp))
        return all(size in (None, given) for size, given in wanted) and self.strategy in (None, strategy)


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


@dataclasses.dataclass(frozen=True)
class MostDevices:
    """How far `fewest_devices` looks: doubling from `first` to at most `last`."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ValueError(f"devices to try must be 1 <= first <= last, got {self.first} to {self.last}")


def suggest(
    request: StepRequest,
    *,
    devices: int,
    batch_tokens: int,
    hardware: Hardware,
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
        batch_tokens: Tokens of an optimizer step, over all devices; what a mesh does not take at once it takes in
            microbatches of one sequence a group of devices.
        hardware: Rates of a device.
        memory_bytes: Of a device.
        rates: What is reached of the hardware's peaks.
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
            sizes = make()
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
        fitting.append(Suggestion(sizes, memory, roofline(sizes, hardware=hardware, rates=rates)))
    if not fitting and not refused:
        raise ValueError(
            f"no mesh of {devices} devices and {sequences} sequences a step meets {constraints}; the sizes must "
            f"multiply to {devices}, dp x fsdp must divide the sequences and tp the key-value heads"
        )
    # Of equals the one that leaves more memory.
    fitting.sort(key=lambda each: (each.time.seconds, each.memory.total))
    refused.sort(key=lambda each: (each.memory is None, 0 if each.memory is None else each.memory.total))
    return Suggestions(fitting, refused)


def fewest_devices(
    request: StepRequest,
    *,
    search: MostDevices,
    batch_tokens: int,
    memory_bytes: float,
    policies: tuple[SavedActivations, ...],
    compiler: Compiler,
    constraints: Constraints = ANY_MESH,
) -> StepSizes | None:
    """A mesh of the fewest devices, by doubling, that holds the step; None where none of those tried does."""
    sequences = _sequences(request, batch_tokens)
    devices = search.first
    while devices <= search.last:
        best: tuple[int, StepSizes] | None = None
        for _, _, make in candidates(
            request, devices=devices, sequences=sequences, policies=policies, constraints=constraints
        ):
            try:
                sizes = make()
            except ValueError:
                continue
            total = step_memory(sizes, compiler=compiler).total
            if total <= memory_bytes and (best is None or total < best[0]):
                best = total, sizes
        if best is not None:
            return best[1]
        devices *= 2
    return None


def candidates(
    request: StepRequest,
    *,
    devices: int,
    sequences: int,
    policies: tuple[SavedActivations, ...],
    constraints: Constraints = ANY_MESH,
) -> Iterator[tuple[MeshConfig, str, Callable[[], StepSizes]]]:
    """(mesh, strategy in words, what makes its sizes or raises ValueError) of every mesh worth judging.

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
) -> Callable[[], StepSizes]:
    def make() -> StepSizes:
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
            context=padded_length(request.context, ring_size=mesh.sp, layout=request.layout),
            batch_size=groups,
        )
        return StepSizes(changed, microbatches=sequences // groups)

    return make


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
