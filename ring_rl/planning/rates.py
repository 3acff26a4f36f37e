"""How fast a planned machine computes and talks: what its data sheets say, what of that is reached, who is joined how.

A group of devices is named by its stride and its size: devices i, i + stride, ..., size of them, in the order of the
mesh, whose innermost axis is sp (`ring_rl.training.mesh`). Of a ring in nodes of GPUs one link in each node leads out,
and all wait for it. What is gathered over nodes enters each of them once, through the ports of all its members.
"""

from __future__ import annotations

import dataclasses

from ring_rl.kernels.hardware import Hardware

__all__ = ["Cluster", "Group", "Rates"]

# Hardware.links of a torus, and its dimensions; behind a switch and where all are joined to all none is far.
_TORUS_DIMENSIONS = {4: 2, 6: 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What is reached of a data sheet's peaks.

    Attributes:
        products_share: Of the peak of matrix products, by products of weights and activations.
        attention_share: Of the same peak, by attention.
        link_share: Of the links' bandwidth.
        hop_latency_seconds: What a transfer to a neighbour takes besides its bytes.
        gathers_overlap: Whether weights are gathered while products run.
    """

    products_share: float
    attention_share: float
    link_share: float
    hop_latency_seconds: float
    gathers_overlap: bool

    def __post_init__(self) -> None:
        for name in ("products_share", "attention_share", "link_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"rates.{name} must lie in (0, 1], got {getattr(self, name)}; 1 is the data sheet's")
        if not 0 <= self.hop_latency_seconds < 1:
            raise ValueError(
                f"rates.hop_latency_seconds must lie in [0, 1), got {self.hop_latency_seconds}; 1e-6 is a microsecond"
            )


@dataclasses.dataclass(frozen=True)
class Group:
    """`size` devices, every `stride`-th; consecutive groups lie side by side."""

    stride: int
    size: int

    @property
    def extent(self) -> int:
        """Devices from its first to the last of the groups that it is interleaved with."""
        return self.stride * self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices, all alike.

    Attributes:
        device: One of them, and its links to others: on a TPU those of the torus, on a GPU those of its node.
        node_devices: Devices of a node; None where all devices are joined by those links.
        between_nodes: The same device with its links to other nodes; None without nodes.
    """

    device: Hardware
    node_devices: int | None = None
    between_nodes: Hardware | None = None

    def __post_init__(self) -> None:
        if (self.node_devices is None) != (self.between_nodes is None):
            raise ValueError("a cluster of nodes needs both node_devices and between_nodes; without nodes leave both")
        if self.node_devices is not None and self.node_devices < 1:
            raise ValueError(f"a node needs at least 1 device, got {self.node_devices}")

    def neighbour_bytes_per_second(self, group: Group) -> float:
        """What each of a ring's devices sends to the next, at the pace of the slowest link."""
        rate = self.device.neighbour_bytes_per_second
        between = self._between(group)
        return rate if between is None else min(rate, between.neighbour_bytes_per_second)

    def gather_bytes_per_second(self, group: Group) -> float:
        """What each device receives of others' shards, over all links: all of them carry as much."""
        rate, between = self.device.bytes_per_second, self._between(group)
        return rate if between is None else min(rate, self._members_a_node(group) * between.bytes_per_second)

    def exchange_bytes_per_second(self, group: Group) -> float:
        """What each device sends in an all-to-all.

        On a torus of d dimensions a byte takes d n^(1/d) / 4 links on its way to one of n devices: as a cube that is
        joined round; without the links that close it, twice as long.
        """
        rate, between = self.device.bytes_per_second, self._between(group)
        if between is not None:
            return min(rate, between.bytes_per_second)
        dimensions = _TORUS_DIMENSIONS.get(self.device.links)
        distance = 1.0 if dimensions is None else dimensions * group.size ** (1 / dimensions) / 4
        return rate / max(distance, 1.0)

    def _between(self, group: Group) -> Hardware | None:
        """What joins the nodes, where the group spans several."""
        within = self.node_devices is None or group.size == 1 or self.node_devices % group.extent == 0
        return None if within else self.between_nodes

    def _members_a_node(self, group: Group) -> int:
        # A group that would fit into a node and lies across two may have one member in one of them.
        whole = self.node_devices is not None and group.extent > self.node_devices
        return max(1, min(group.size, (self.node_devices or 1) // group.stride)) if whole else 1
