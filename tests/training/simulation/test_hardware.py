"""The model of a machine against times worked out by hand."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from simulator_cases import MACHINE

from mohge.training.simulation.hardware import Hardware


def test_exchange_in_one_node_is_limited_by_its_busiest_device():
    sent = torch.tensor([[0.0, 30.0], [50.0, 0.0]])
    same_node = torch.ones(2, 2, dtype=torch.bool)
    # One message each; both send or receive 50 bytes.
    assert MACHINE.exchange_seconds(sent, same_node).tolist() == [0.5 + 5.0, 0.5 + 5.0]


def test_exchange_between_nodes_runs_beside_that_inside_them():
    sent = torch.zeros(4, 4)
    sent[0, 1], sent[0, 2], sent[3, 0] = 100, 4, 6
    node = torch.tensor([0, 0, 1, 1])
    seconds = MACHINE.exchange_seconds(sent, node[:, None] == node)
    # Each device has one neighbour (latency 0.5) and two devices elsewhere (latency 1 each).
    # 0: 100 bytes to 1 inside; outside 4 bytes out and 6 in. 1: 100 in. 2: 4 in from outside. 3: 6 out.
    assert seconds.tolist() == [0.5 + 10, 0.5 + 10, 2 + 2, 2 + 3]


def test_devices_with_processors_of_their_own_wait_for_the_slowest():
    seconds = torch.tensor([[3.0, 1.0, 6.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
    assert MACHINE.wait_for_all(seconds).tolist() == [6.0, 2.0]


def test_devices_that_share_processors_slow_each_other_down():
    seconds = torch.tensor([[3.0, 1.0, 6.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
    # On two processors: 1 second of all four takes 2, the next of three 1.5, then two, and one, run at full speed.
    assert replace(MACHINE, processors=2).wait_for_all(seconds).tolist() == [2 + 1.5 + 1 + 3, 4.0]
    assert replace(MACHINE, processors=4).wait_for_all(seconds).tolist() == [6.0, 2.0]


def test_experts_take_the_longer_of_arithmetic_and_memory():
    seconds = MACHINE.expert_seconds(torch.tensor([4000.0, 1000.0]), torch.tensor([500.0, 2000.0]))
    assert seconds.tolist() == [3 + 4, 3 + 4]


def test_hardware_survives_its_file(tmp_path):
    for machine in (MACHINE, replace(MACHINE, processors=2)):
        machine.save(tmp_path / "machine.json")
        assert Hardware.load(str(tmp_path / "machine.json")) == machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops_per_second": 0}, "`flops_per_second` is 0: it must be a number, above 0"),
        ({"link_latency_seconds": -1}, "`link_latency_seconds` is -1: it must be a number, at least 0"),
        ({"link_bytes_per_second": float("nan")}, "`link_bytes_per_second`"),
        ({"link_bytes_per_second": "fast"}, "`link_bytes_per_second`"),
        ({"node_size": 1.5}, "`node_size` is 1.5: it must be a whole number, at least 1"),
        ({"processors": 0}, "`processors`"),
        ({"speed": 1}, "does not describe hardware"),
    ],
    ids=["zero speed", "negative time", "nan", "text", "half a device", "no processor", "unknown field"],
)
def test_hardware_file_with_nonsense(change, message, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({**asdict(MACHINE), **change}))
    with pytest.raises(ValueError, match=message) as error:
        Hardware.load(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["not json", "[1]", '{"name": "x"}'])
def test_hardware_file_with_something_else(content, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"machine\.json"):
        Hardware.load(str(path))
