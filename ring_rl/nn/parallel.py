"""Where a model's activations and weights live: which mesh axes share the batch, the sequence, the heads."""

import dataclasses
import math
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_rl.kernels.layout import Layout, check_length
from ring_rl.kernels.local.block import LocalBlock, LocalName
from ring_rl.kernels.strategies.ulysses import check_heads
from ring_rl.typing import Array, Shaped

SequenceStrategy = Literal["auto", "ring", "all_gather", "ulysses", "hybrid", "dense"]
SEQUENCE_STRATEGIES: tuple[SequenceStrategy, ...] = ("auto", "ring", "all_gather", "ulysses", "hybrid", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceParallel:
    """A mesh, what its axes are for, and how the devices that share a sequence attend to one another.

    An axis that the mesh lacks counts as one of size 1.

    Attributes:
        mesh: The devices.
        layout: The order in which token axes arrive, already permuted.
        strategy: How shards of a sequence meet; see `ring_rl.kernels.attention`. "dense" is for sequences that are
            whole on a device, whose scores it forms all at once: the yardstick, in O(T²) memory.
        ulysses_size: With strategy="hybrid": how many neighbours on `sequence_axis` swap tokens for heads, inside a
            ring of the groups of them. 1 otherwise.
        batch_axes: The mesh axes that batches are sharded over.
        weight_axes: The mesh axes over which, together, the width of weights is sharded; they are gathered for use.
            With `sequence_axis` among them the devices that share a sequence share the weights, too.
        tensor_axis: The mesh axis that heads, the feed-forward's width and the vocabulary are sharded over.
        sequence_axis: The mesh axis that token axes are sharded over.
        local_block: What computes one device's share of attention; see `ring_rl.kernels.attention`. "auto" is the best
            one of the platform that runs; a program for another platform, or one that stands for others as compiled
            memory does, needs its block named.
        heads_at_once: Key-value heads that go round the ring at a time: fewer for longer contexts; None leaves it to
            the block. See `ring_rl.kernels.attention`.
    """

    mesh: Mesh
    layout: Layout
    strategy: SequenceStrategy = "ring"
    ulysses_size: int = 1
    batch_axes: tuple[str, ...] = ("dp", "fsdp")
    weight_axes: tuple[str, ...] = ("fsdp",)
    tensor_axis: str = "tp"
    sequence_axis: str = "sp"
    local_block: LocalName | LocalBlock = "auto"
    heads_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.strategy not in SEQUENCE_STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}; choose one of {', '.join(SEQUENCE_STRATEGIES)}")
        if self.heads_at_once is not None and self.heads_at_once < 1:
            raise ValueError(f"heads_at_once must be at least 1, or null to leave it be; got {self.heads_at_once}")
        if self.ulysses_size < 1 or self.sequence_devices % self.ulysses_size:
            raise ValueError(
                f"ulysses_size={self.ulysses_size} does not divide {self.sequence_axis}={self.sequence_devices}; "
                "choose a divisor"
            )
        if self.strategy == "dense" and self.sequence_devices > 1:
            raise ValueError(
                f"strategy='dense' needs each sequence whole on a device, got {self.sequence_axis}="
                f"{self.sequence_devices}; set it to 1 and give its devices to dp or fsdp, or use strategy='ring'"
            )
        if self.ulysses_size > 1 and self.strategy != "hybrid":
            raise ValueError(
                f"ulysses_size={self.ulysses_size} means nothing to strategy={self.strategy!r}; "
                "set it to 1, or use strategy='hybrid'"
            )

    @property
    def sequence_devices(self) -> int:
        """Devices that share one sequence."""
        return self.size(self.sequence_axis)

    @property
    def ring_size(self) -> int:
        """Devices, or with strategy="hybrid" groups of them, among which the layout deals out a sequence."""
        return self.sequence_devices // self.ulysses_size

    @property
    def tensor_devices(self) -> int:
        """Devices that share the heads."""
        return self.size(self.tensor_axis)

    @property
    def token_spec(self) -> PartitionSpec:
        """The sharding of arrays [batch, tokens, ...]."""
        return PartitionSpec(self._present(self.batch_axes), self._present((self.sequence_axis,)))

    def size(self, axis: str) -> int:
        """Devices along a mesh axis; 1 where the mesh has no such axis."""
        return self.mesh.shape.get(axis, 1)

    def check(self, batch: int, length: int) -> None:
        """Raises ValueError unless the mesh can share `batch` sequences of `length` tokens."""
        sizes = {axis: self.mesh.shape[axis] for axis in self._present(self.batch_axes)}
        data_parallel = math.prod(sizes.values())
        if batch % data_parallel:
            raise ValueError(
                f"batch of {batch} sequences is not divisible by "
                f"{' x '.join(f'{axis}={size}' for axis, size in sizes.items())}; use a multiple of {data_parallel}"
            )
        check_length(length, ring_size=self.ring_size, layout=self.layout)
        if length // self.ring_size % self.ulysses_size:
            raise ValueError(
                f"the {length // self.ring_size} tokens of a group are not divisible by ulysses_size="
                f"{self.ulysses_size}; pad the sequence to a multiple of {self.sequence_devices * 2}"
            )

    def check_heads(self, *, query_heads: int, key_value_heads: int) -> None:
        """Raises ValueError unless the tensor axis, and then the strategy, can share the heads."""
        tensor = self.tensor_devices
        for name, heads in (("query_heads", query_heads), ("key_value_heads", key_value_heads)):
            if heads % tensor:
                raise ValueError(
                    f"{name}={heads} cannot be shared by {self.tensor_axis}={tensor}; choose a multiple of {tensor}, "
                    f"or a divisor of {math.gcd(query_heads, key_value_heads)} for the mesh axis {self.tensor_axis}"
                )
        exchanging = {"ulysses": self.sequence_devices, "hybrid": self.ulysses_size}.get(self.strategy, 1)
        check_heads(query_heads=query_heads // tensor, key_value_heads=key_value_heads // tensor, devices=exchanging)

    def check_divides(self, name: str, size: int) -> None:
        """Raises ValueError unless the tensor axis divides `size`, a width called `name`."""
        if size % self.tensor_devices:
            raise ValueError(
                f"{name}={size} cannot be shared by {self.tensor_axis}={self.tensor_devices}; "
                f"use a multiple of {self.tensor_devices}"
            )

    def constrain(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """`x`, told to the compiler to be sharded over batch and tokens."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.token_spec))

    def local(self) -> "LocalParallel":
        """What `jax.shard_map` needs to run a model on each device's share."""
        names, devices = list(self.mesh.axis_names), self.mesh.devices
        sequence_axes = self._present((self.sequence_axis,))
        if self.strategy == "hybrid" and sequence_axes:
            # The same devices in the same order, the sequence axis seen as ring x ulysses.
            at = names.index(self.sequence_axis)
            sequence_axes = (f"{self.sequence_axis}_ring", f"{self.sequence_axis}_ulysses")
            names[at : at + 1] = sequence_axes
            shape = (*devices.shape[:at], self.ring_size, self.ulysses_size, *devices.shape[at + 1 :])
            devices = np.asarray(devices, dtype=object).reshape(shape)
        types = (self.mesh.axis_types[0],) * len(names)
        weight_axes = tuple(
            name
            for axis in self.weight_axes
            if self.size(axis) > 1
            for name in (sequence_axes if axis == self.sequence_axis else (axis,))
        )
        return LocalParallel(
            mesh=self.mesh if len(names) == len(self.mesh.axis_names) else Mesh(devices, names, axis_types=types),
            layout=self.layout,
            strategy=self.strategy,
            batch_axes=self._present(self.batch_axes),
            weight_axes=weight_axes,
            tensor_axis=self.tensor_axis if self.size(self.tensor_axis) > 1 else None,
            sequence_axes=sequence_axes,
            local_block=self.local_block,
            heads_at_once=self.heads_at_once,
        )

    def _present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if axis in self.mesh.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalParallel:
    """`SequenceParallel` as the inside of `jax.shard_map` sees it; axes that are not there are left out.

    Attributes:
        mesh: The mesh to map over; with strategy="hybrid" its sequence axis is two.
        layout: As in `SequenceParallel`.
        strategy: As in `SequenceParallel`.
        batch_axes: Mesh axes that the batch is sharded over.
        weight_axes: The mesh axes that weights are gathered over.
        tensor_axis: The mesh axis whose devices share the heads, or None.
        sequence_axes: The mesh axes that tokens are sharded over: none, one, or (ring, ulysses).
        local_block: As in `SequenceParallel`.
        heads_at_once: As in `SequenceParallel`.
    """

    mesh: Mesh
    layout: Layout
    strategy: SequenceStrategy
    batch_axes: tuple[str, ...]
    weight_axes: tuple[str, ...]
    tensor_axis: str | None
    sequence_axes: tuple[str, ...]
    local_block: LocalName | LocalBlock
    heads_at_once: int | None

    @property
    def token_axes(self) -> tuple[str, ...]:
        """All axes over which activations differ."""
        return (*self.batch_axes, *self.sequence_axes)

    @property
    def token_spec(self) -> PartitionSpec:
        """The sharding of arrays [batch, tokens, ...]."""
        return PartitionSpec(self.batch_axes, self.sequence_axes)

    def sum_over_tensor_axis(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Σ over the devices that share the heads; only inside `jax.shard_map`."""
        return x if self.tensor_axis is None else jax.lax.psum(x, self.tensor_axis)
