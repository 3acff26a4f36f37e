"""Reads the order of a compiled program: what a device computes while a transfer is under way.

The text of a compiled program (`jax.stages.Compiled.as_text()`) lists the instructions of each computation in the order
in which they run. A transfer that is asynchronous is two of them, a start and a done, and is hidden by what stands
between. Loops are computations of their own, so what happens in a loop is listed once.
"""

import dataclasses
import re
from collections.abc import Iterator
from functools import cached_property

_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s32": 4, "u32": 4, "s64": 8, "pred": 1, "s8": 1, "u8": 1}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
# The type comes first; it ends in a letter, a bracket or a layout, and holds no lower-case word before a parenthesis.
_OPCODE = re.compile(r"(?:^|[\s)}\]])(?P<opcode>[a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|branch_computations)=\{?(?P<names>%?[\w.\-]+(?:, *%[\w.\-]+)*)")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    opcode: str
    text: str
    called: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Permute:
    """One collective permute.

    Attributes:
        name: Of the instruction that starts it.
        computation: Where it is.
        trips: How often a run of the program gets there; None where a loop's count is not known from the text.
        array: What travels, as in "bf16[2,1,8192,8,128]".
        bytes: Its size.
        asynchronous: Whether it is started and awaited, and not one instruction.
        covered_by: Names of the instructions in between that multiply matrices.
    """

    name: str
    computation: str
    trips: int | None
    array: str
    bytes: int
    asynchronous: bool
    covered_by: tuple[str, ...]

    @property
    def overlapped(self) -> bool:
        """Whether matrices are multiplied while it is under way."""
        return self.asynchronous and bool(self.covered_by)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A compiled program: its computations, each a list of instructions in the order in which they run."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]

    @staticmethod
    def parse(text: str) -> "Schedule":
        """Reads a compiled program.

        Raises:
            ValueError: It is not the text of a scheduled program.
        """
        if "is_scheduled=true" not in text.split("\n", 1)[0]:
            raise ValueError("the program is not scheduled: its first line lacks is_scheduled=true; compile it first")
        computations: dict[str, list[Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if (found := _COMPUTATION.match(line)) is not None:
                current = computations.setdefault(found["name"], [])
                entry = found["name"] if found["entry"] else entry
            elif current is not None and (found := _INSTRUCTION.match(line)) is not None:
                current.append(_instruction(found["name"], found["rest"]))
        if entry is None:
            raise ValueError("the program has no ENTRY computation; is its text whole?")
        return Schedule(entry, {name: tuple(lines) for name, lines in computations.items()})

    def multiplies(self, instruction: Instruction) -> bool:
        """Whether it multiplies matrices, itself or in what it calls."""
        return _is_product(instruction) or not self._multiplying.isdisjoint(instruction.called)

    def permutes(self) -> list[Permute]:
        """Every collective permute that a run of the program gets to, in the order of its computations."""
        return [permute for name, trips in self._reached() for permute in self._permutes_in(name, trips)]

    @cached_property
    def _multiplying(self) -> frozenset[str]:
        """Names of the computations in which matrices are multiplied."""
        found: set[str] = set()
        # Mostly a computation is listed after those that it calls, but nothing promises it.
        while more := {
            name
            for name, lines in self.computations.items()
            if name not in found and any(_is_product(line) or not found.isdisjoint(line.called) for line in lines)
        }:
            found |= more
        return frozenset(found)

    def _reached(self) -> Iterator[tuple[str, int | None]]:
        """Computations that run, from the entry on, and how often."""
        pending: list[tuple[str, int | None]] = [(self.entry, 1)]
        while pending:
            name, trips = pending.pop(0)
            yield name, trips
            for line in self.computations.get(name, ()):
                more = self._trip_count(line) if line.opcode == "while" else 1
                for called in line.called:
                    pending.append((called, None if trips is None or more is None else trips * more))

    def _trip_count(self, loop: Instruction) -> int | None:
        """How often a loop's body runs, where its condition compares a counter from 0 with a constant."""
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        if condition is None:
            return None
        lines = {line.name: line for line in self.computations.get(condition[1], ())}
        for line in lines.values():
            if line.opcode == "compare" and "direction=LT" in line.text:
                for operand in re.findall(r"%([\w.\-]+)", line.text):
                    constant = re.search(r"constant\((\d+)\)", lines[operand].text) if operand in lines else None
                    if constant is not None:
                        return int(constant[1])
        return None

    def _permutes_in(self, computation: str, trips: int | None) -> Iterator[Permute]:
        lines = self.computations.get(computation, ())
        for start, line in enumerate(lines):
            if line.opcode not in ("collective-permute", "collective-permute-start"):
                continue
            covered_by: list[str] = []
            asynchronous = line.opcode == "collective-permute-start"
            if asynchronous:
                awaits = re.compile(rf"collective-permute-done\(.*%{re.escape(line.name)}\)")
                done = next((i for i, other in enumerate(lines) if awaits.search(other.text)), None)
                if done is None:
                    raise ValueError(f"{line.name} in {computation} is started and never awaited; is the text whole?")
                covered_by = [other.name for other in lines[start + 1 : done] if self.multiplies(other)]
            array, size = _first_array(line.text)
            yield Permute(line.name, computation, trips, array, size, asynchronous, tuple(covered_by))


def _is_product(line: Instruction) -> bool:
    # Other custom calls move data: only kernels compute.
    is_kernel = line.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in line.text
    return is_kernel or line.opcode in ("dot", "convolution")


def _instruction(name: str, rest: str) -> Instruction:
    opcode = _OPCODE.search(rest)
    called = [c.strip().lstrip("%") for found in _CALLED.finditer(rest) for c in found["names"].split(",")]
    return Instruction(name, opcode["opcode"] if opcode else "", rest, tuple(called))


def _first_array(text: str) -> tuple[str, int]:
    found = _ARRAY.search(text)
    if found is None:
        return "", 0
    elements = 1
    for edge in filter(None, found["shape"].split(",")):
        elements *= int(edge)
    return found[0], elements * _BYTES.get(found["dtype"], 0)
