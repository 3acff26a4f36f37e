"""What reaches whom how fast, in nodes and on a torus."""

import dataclasses

import pytest

from ring_rl.kernels.hardware import Hardware
from ring_rl.planning.rates import Cluster, Group, Rates

GPU = Hardware(name="gpu", flops_per_second=1e9, memory_bytes=1e9, bytes_per_second=450.0, links=1, source="made up")
PORT = dataclasses.replace(GPU, name="port", bytes_per_second=50.0)
NODES = Cluster(device=GPU, node_devices=8, between_nodes=PORT)
RATES = Rates(products_share=1.0, attention_share=1.0, link_share=1.0, hop_latency_seconds=1e-6, gathers_overlap=False)


def torus(links):
    return Cluster(device=dataclasses.replace(GPU, links=links))


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    [
        (1, 8, 450),  # a node
        (2, 4, 450),  # every second device of it
        (1, 16, 50),  # two nodes
        (8, 4, 50),  # one device of each of four nodes
        (1, 3, 50),  # some of these lie across two nodes
        (64, 1, 450),  # nobody else
    ],
)
def test_a_ring_runs_at_the_pace_of_its_slowest_link(stride, size, expected):
    assert NODES.neighbour_bytes_per_second(Group(stride, size)) == expected


@pytest.mark.parametrize(
    ("stride", "size", "expected"), [(1, 8, 450), (1, 32, 400), (2, 16, 200), (8, 4, 50), (1, 3, 50)]
)
def test_what_is_gathered_enters_a_node_by_the_ports_of_its_members(stride, size, expected):
    assert NODES.gather_bytes_per_second(Group(stride, size)) == expected


def test_an_exchange_leaves_a_node_by_the_own_port():
    assert NODES.exchange_bytes_per_second(Group(1, 8)) == 450
    assert NODES.exchange_bytes_per_second(Group(1, 16)) == 50


def test_a_neighbour_on_a_torus_is_one_link_away():
    assert torus(4).neighbour_bytes_per_second(Group(1, 16)) == 450 / 4
    assert torus(4).gather_bytes_per_second(Group(1, 16)) == 450


def test_an_exchange_on_a_torus_takes_many_links():
    # 16 x 16: half of 256 devices send half of what they have over 2 x 16 links, of 450 / 4 each.
    seconds_a_byte = 128 / 2 / (32 * 450 / 4)
    assert 1 / torus(4).exchange_bytes_per_second(Group(1, 256)) == pytest.approx(seconds_a_byte)
    # 4 x 4 x 4 devices, on average 3 links apart, 6 links each.
    assert torus(6).exchange_bytes_per_second(Group(1, 64)) == pytest.approx(450 / 3)
    # Neighbours send to one another over no more links than they have.
    assert torus(4).exchange_bytes_per_second(Group(1, 2)) == 450
    # Where all are joined to all, nobody is far.
    assert torus(7).exchange_bytes_per_second(Group(1, 8)) == 450


@pytest.mark.parametrize("share", ["products_share", "attention_share", "link_share"])
def test_a_share_beyond_the_peak_is_refused(share):
    with pytest.raises(ValueError, match=f"{share} must lie in"):
        dataclasses.replace(RATES, **{share: 1.5})


def test_impossible_latencies_and_nodes_are_refused():
    with pytest.raises(ValueError, match="hop_latency_seconds must lie in"):
        dataclasses.replace(RATES, hop_latency_seconds=-1e-6)
    with pytest.raises(ValueError, match="both node_devices and between_nodes"):
        Cluster(device=GPU, node_devices=8)
    with pytest.raises(ValueError, match="at least 1 device"):
        Cluster(device=GPU, node_devices=0, between_nodes=PORT)
