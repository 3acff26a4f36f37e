"""A table of longest contexts: rows of models on machines, columns of ways to attend, a search in every cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.planning.attentions import AttentionVariant, StepSettings, step_request
from ring_rl.planning.compile_process import CompilationFailedError, CompileProcesses, key_of, remembered
from ring_rl.planning.compiled_step import CompiledMemory, StepRequest
from ring_rl.planning.feasibility import first_guess, model_sizes, problem_of
from ring_rl.planning.probe_cache import ProbeCache
from ring_rl.planning.search import Probe, known_limit, next_length, token_grid
from ring_rl.planning.topology import TPU_SLICES, Machine, TpuSlice, machine_named

__all__ = [
    "Cell",
    "CellResult",
    "LimitsConfig",
    "Plan",
    "PublishedContexts",
    "Row",
    "plan_of",
    "report_problems",
    "search_cells",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model on a machine, both by name; a machine that is spelt another way, as V5E-8, is called v5e-8."""

    model: str
    machine: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "machine", machine_named(self.machine).name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedContexts:
    """What a paper gives.

    Attributes:
        source: Where from.
        differs: What stands between its numbers and ours.
        contexts: Thousands (of 1024) of tokens by machine, model and way to attend.
    """

    source: str
    differs: tuple[str, ...]
    contexts: dict[str, dict[str, dict[str, int]]]

    def tokens(self, cell: Cell) -> int | None:
        """Of a cell; None where the paper says nothing."""
        thousands = self.contexts.get(cell.row.machine, {}).get(cell.row.model, {}).get(cell.attention)
        return None if thousands is None else 1024 * thousands


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """A table; conf/context_limits.yaml documents every key."""

    name: str
    models: dict[str, TransformerConfig]
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    attentions: dict[str, AttentionVariant]
    settings: StepSettings
    quantum: int
    largest_tokens_a_device: int
    significant_bits: int
    expected_seconds: float
    expected_gpu_seconds: float
    expectation: str
    processes: int
    probes: Path
    output: Path
    published: PublishedContexts
    dry_run: bool
    partial: bool
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be that of a table, without a slash, got {self.name!r}")
        for key in ("rows", "columns"):
            if not getattr(self, key):
                raise ValueError(f"a table needs rows and columns, and {key} is empty; name at least one")
        for column in self.columns:
            if column not in self.attentions:
                raise ValueError(f"unknown attention {column!r}; choose of {', '.join(self.attentions)}")
        for row in self.rows:
            if row.model not in self.models:
                raise ValueError(f"unknown model {row.model!r}; choose of {', '.join(self.models)}")
        for key, names in (
            ("rows", [f"{row.model} on {row.machine}" for row in self.rows]),
            ("columns", list(self.columns)),
            ("the labels of columns", [self.attentions[column].label for column in self.columns]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{key} must differ, and {twice!r} is there twice; take one away")
        for key in ("expected_seconds", "expected_gpu_seconds"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}")
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if self.quantum % 2:
            raise ValueError(f"quantum must be even, because zigzag cuts a device's tokens in two, got {self.quantum}")
        token_grid(quantum=self.quantum, largest=self.largest_tokens_a_device, significant_bits=self.significant_bits)

    @property
    def cells(self) -> list[Cell]:
        """Row by row."""
        return [Cell(row=row, attention=column) for row in self.rows for column in self.columns]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A row and a column."""

    row: Row
    attention: str

    def __str__(self) -> str:
        return f"{self.row.model} on {self.row.machine}, {self.attention}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a cell is searched.

    Attributes:
        cell: The cell.
        machine: Its machine.
        variant: Its way to attend.
        parameters: Of the model as compiled.
        state_bytes: Parameters and moments on a device, at least.
        lengths: Tokens a device to choose among.
        start: Of them, where to begin.
        request: The step of so many tokens a device.
        problem: Why no length can fit; None where one may.
    """

    cell: Cell
    machine: Machine
    variant: AttentionVariant
    parameters: int
    state_bytes: int
    lengths: Sequence[int]
    start: int
    request: Callable[[int], StepRequest]
    problem: str | None

    def known(self, cache: ProbeCache) -> dict[int, CompiledMemory]:
        """What was said about any of its lengths."""
        if self.problem:
            return {}
        answers = {length: cache.get(key_of(self.request(length), self.machine)) for length in self.lengths}
        return {length: answer.memory for length, answer in answers.items() if answer is not None}

    def next(self, known: Mapping[int, CompiledMemory]) -> int | None:
        """Tokens a device to compile now; None when the cell is done."""
        if self.problem:
            return None
        return next_length(
            self.lengths,
            self._probes(known),
            start=self.start,
            memory_bytes=self.machine.memory_bytes,
            fixed_bytes=self.state_bytes,
            degree=2 if self.variant.strategy == "dense" else 1,
        )

    def result(self, known: Mapping[int, CompiledMemory]) -> CellResult:
        """The cell as far as it is known."""
        limit = known_limit(self.lengths, self._probes(known)) if known else None
        longest = None if limit is None else limit.longest
        return CellResult(
            plan=self,
            tokens_a_device=longest,
            failing_tokens_a_device=None if limit is None else limit.shortest_failing,
            known=dict(known),
            final=self.next(known) is None,
        )

    def _probes(self, known: Mapping[int, CompiledMemory]) -> dict[int, Probe]:
        return {
            length: Probe(
                fits=memory.fits(self.machine.memory_bytes),
                needed_bytes=memory.peak_bytes or memory.wanted_bytes,
            )
            for length, memory in known.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellResult:
    """A cell, done or on its way.

    Attributes:
        plan: What was searched.
        tokens_a_device: The longest that was seen to fit.
        failing_tokens_a_device: The shortest that was seen not to.
        known: What the compiler said, by tokens a device.
        final: Whether the two are neighbours.
        failure: Why the search ended without an answer.
    """

    plan: Plan
    tokens_a_device: int | None
    failing_tokens_a_device: int | None
    known: dict[int, CompiledMemory]
    final: bool
    failure: str | None = None

    @property
    def context(self) -> int | None:
        """Tokens of the longest sequence that fits."""
        return None if self.tokens_a_device is None else self.plan.request(self.tokens_a_device).context

    @property
    def peak_bytes(self) -> int | None:
        """Of a device, at that context."""
        return None if self.tokens_a_device is None else self.known[self.tokens_a_device].peak_bytes

    @property
    def compile_seconds(self) -> float:
        """All probes together, lowering included."""
        return sum(memory.lower_seconds + memory.compile_seconds for memory in self.known.values())


def plan_of(config: LimitsConfig, cell: Cell) -> Plan:
    """How a cell is searched, and whether it can be."""
    machine, variant = machine_named(cell.row.machine), config.attentions[cell.attention]
    transformer = config.models[cell.row.model]

    def request(tokens_a_device: int) -> StepRequest:
        return _request(config, variant, transformer, machine, tokens_a_device)

    lengths = token_grid(
        quantum=config.quantum, largest=config.largest_tokens_a_device, significant_bits=config.significant_bits
    )
    shortest = request(lengths[0])
    sizes = model_sizes(shortest, devices=machine.devices)
    problem = problem_of(shortest, machine)
    if problem is not None:
        problem = f"{cell}: {problem}; {_remedy(config, variant, transformer, machine)}"
    return Plan(
        cell=cell,
        machine=machine,
        variant=variant,
        parameters=sizes.parameters,
        state_bytes=sizes.state_bytes,
        lengths=lengths,
        start=first_guess(shortest, machine),
        request=request,
        problem=problem,
    )


def report_problems(plans: Sequence[Plan]) -> list[str]:
    """Why some cells cannot be compiled, a line each.

    Raises:
        ValueError: None of them can; with the reason of the first.
    """
    problems = [plan.problem for plan in plans if plan.problem]
    if len(problems) == len(plans):
        raise ValueError(problems[0])
    return problems


def search_cells(
    plans: Sequence[Plan],
    cache: ProbeCache,
    processes: CompileProcesses,
    *,
    workers: int,
    on_probe: Callable[[Plan, int, CompiledMemory], None],
    on_done: Callable[[CellResult], None],
) -> list[CellResult]:
    """Searches all cells, `workers` at a time, each in a thread that waits for compilers.

    A compiler that fails ends its own cell, whose result says why. What is known is in `cache`, whatever happens.

    Args:
        plans: The cells.
        cache: What is known, and what becomes known.
        processes: Of compilers; left by whoever entered it.
        workers: Compilers at once.
        on_probe: Called with every answer that was not known before, from a worker's thread.
        on_done: Called with every finished cell, from this thread.
    """

    def search(plan: Plan) -> CellResult:
        known = plan.known(cache)
        try:
            while (length := plan.next(known)) is not None:
                known[length] = remembered(plan.request(length), plan.machine, cache=cache, processes=processes)
                on_probe(plan, length, known[length])
        except (CompilationFailedError, ValueError) as error:
            return dataclasses.replace(plan.result(known), failure=str(error))
        return plan.result(known)

    executor = ThreadPoolExecutor(max_workers=workers)
    try:
        waiting = [executor.submit(search, plan) for plan in plans]
        order, left = list(waiting), set(waiting)
        while left:
            done, left = wait(left, return_when=FIRST_COMPLETED)
            for future in done:
                on_done(future.result())
        return [future.result() for future in order]
    finally:
        # Threads that wait for a compiler end with it, when `processes` is left.
        executor.shutdown(wait=False, cancel_futures=True)


def _request(
    config: LimitsConfig,
    variant: AttentionVariant,
    transformer: TransformerConfig,
    machine: Machine,
    tokens_a_device: int,
) -> StepRequest:
    return step_request(
        variant,
        transformer,
        config.settings,
        devices=machine.devices,
        estimated=machine.estimated,
        tokens_a_device=tokens_a_device,
    )


def _remedy(config: LimitsConfig, variant: AttentionVariant, transformer: TransformerConfig, machine: Machine) -> str:
    """The smallest machine of the same kind on which there is no problem."""
    if isinstance(machine, TpuSlice):
        others: list[Machine] = [each for each in TPU_SLICES.values() if each.generation == machine.generation]
    else:
        # Groups that share a sequence, by doubling.
        group = variant.tensor_devices * (variant.sequence_devices or variant.ulysses_size)
        others = [dataclasses.replace(machine, devices=group * 2**power) for power in range(14)]
    name = lambda other: other.name if isinstance(other, TpuSlice) else f"{other.devices} of these GPUs"  # noqa: E731
    serving = [
        other
        for other in others
        if problem_of(_request(config, variant, transformer, other, config.quantum), other) is None
    ]
    if not serving:
        if isinstance(machine, TpuSlice):
            return f"no slice of {machine.generation} would do"
        return f"none of {', '.join(str(other.devices) for other in others[:3])}, ... of these GPUs would do"
    smallest = f"the smallest that would do: {name(serving[0])}"
    return (
        smallest if serving[-1] is others[-1] or len(serving) == 1 else f"{smallest}, the largest: {name(serving[-1])}"
    )
