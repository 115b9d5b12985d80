"""`mohge simulate`, and the benchmark that holds the simulator against real processes."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest

from mohge import MoHGEConfig
from mohge.commands.main import main
from mohge.training.benchmarks import simulation
from mohge.training.loop.traffic import RouterTraffic
from mohge.training.placement.allocations import ALLOCATIONS
from mohge.training.placement.costs import dense_flops
from mohge.training.simulation.hardware import HARDWARE, Hardware


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_sizes": [8, 24],
    "num_experts_per_group": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 8,
}


@pytest.fixture
def folder(tmp_path):
    config = MoHGEConfig(**SMALL)
    config.save_pretrained(tmp_path)
    traffic = RouterTraffic(config)
    # All tokens want the wide experts, ids 1, 3, 5 and 7.
    traffic.extend([(16, [[0, 8] * 4, [0, 8] * 4])])
    traffic.save(tmp_path / "traffic.json")
    return tmp_path


def simulated(folder, capsys, *arguments):
    assert main(["simulate", str(folder), "--steps", "2", "--format", "json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_a_row_for_each_number_of_devices_and_allocation(folder, capsys):
    report = simulated(folder, capsys, "--devices", "2,12", "--tokens", "100")
    assert report["hardware"] == asdict(HARDWARE["h100"])
    rows = [(row["devices"], row["ep_size"], row["allocation"]) for row in report["results"]]
    assert rows == [(devices, size, name) for devices, size in ((2, 2), (12, 4)) for name in ALLOCATIONS]
    for row in report["results"]:
        assert 1 <= row["expert_time_max_over_mean"] <= row["expert_time_max_over_mean_p95"]
        assert row["device_time_max_over_mean"] >= 1
        assert 0 < row["step_seconds"] < 1
        assert 0 <= row["waiting_share"] < 1


def test_runs_are_reproducible(folder, capsys):
    first, again, other = (simulated(folder, capsys, "--devices", "4", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first["results"] != other["results"]


def test_recorded_traffic_is_what_decides(folder, capsys):
    """Where only wide experts are chosen, contiguous allocation leaves half of the devices without work."""
    hardware = Hardware(
        name="arithmetic only",
        flops_per_second=1e9,
        memory_bytes_per_second=1e30,
        kernel_overhead_seconds=0,
        link_bytes_per_second=1e30,
        link_latency_seconds=0,
        node_size=8,
        inter_node_bytes_per_second=1e30,
        inter_node_latency_seconds=0,
    )
    hardware.save(folder / "hardware.json")
    report = simulated(
        folder,
        capsys,
        *("--devices", "4", "--tokens", "16", "--hardware", str(folder / "hardware.json")),
        *("--traffic", str(folder / "traffic.json")),
    )
    results = {row["allocation"]: row for row in report["results"]}
    imbalance = {name: row["expert_time_max_over_mean"] for name, row in results.items()}
    assert imbalance["all-size"] == pytest.approx(1)
    assert imbalance["contiguous"] == pytest.approx(2)
    assert report["recorded_passes"] == 1
    # Dense part and experts of 16 tokens, forward and backward; the wide experts cost 6 * 16 * 24 per choice.
    dense = 16 * sum(dense_flops(MoHGEConfig(**SMALL), 4096).values())
    expert = 2 * 32 * 6 * 16 * 24
    assert results["all-size"]["step_seconds"] == pytest.approx(3 * (dense + expert) / 1e9)
    assert results["contiguous"]["step_seconds"] == pytest.approx(3 * (dense + 2 * expert) / 1e9)


def test_text_is_one_table_that_says_what_it_means(folder, capsys):
    assert main(["simulate", str(folder), "--steps", "1", "--devices", "2,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == HARDWARE["h100"].name
    assert lines[1].endswith("routing balanced")
    assert [line.split()[:3] for line in lines[4:12]] == [[d, d, name] for d in ("2", "4") for name in ALLOCATIONS]
    assert lines[13].startswith("expert time  slowest over mean device")


def test_plot(folder, capsys):
    for name, start in (("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml")):
        simulated(folder, capsys, "--devices", "2,4", "--plot", str(folder / name))
        assert (folder / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices has 0"),
        (["--devices", "6", "--ep-size", "4"], "`ep_size` 4 does not fit: use 1 or 2"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--steps", "-1"], "--steps is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--hardware", "abacus"], "no hardware abacus: give a file, or one of h100, h200"),
        (["--hardware", "config.json"], "does not describe hardware"),
        (["--traffic", "config.json"], "is no recorded traffic"),
        (["--traffic", "missing.json"], "missing.json"),
        (["--plot", "plot.docx"], "--plot plot.docx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(arguments, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["simulate", ".", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mohge simulate: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_traffic_of_another_config_is_refused(folder, capsys):
    MoHGEConfig(**{**SMALL, "moe_intermediate_sizes": [8, 32]}).save_pretrained(folder)
    assert main(["simulate", str(folder), "--traffic", str(folder / "traffic.json")]) == 2
    assert "recorded with other experts" in capsys.readouterr().err


def test_benchmark_on_two_processes(folder):
    """Real experts and all-to-alls: results right, and predicted beside measured for every allocation."""
    tiny = ["--tokens", "64", "--steps", "2", "--repeats", "2", "--device", "cpu"]
    files = ["--json", str(folder / "figures.json"), "--save-hardware", str(folder / "hardware.json")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "mohge.training.benchmarks.simulation", "--config", str(folder), *tiny, *files),
            *("--traffic", str(folder / "traffic.json")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("check: ") == len(ALLOCATIONS)
    figures = json.loads((folder / "figures.json").read_text())
    assert max(figures["errors"].values()) < 1e-4
    assert set(figures["results"]) == set(ALLOCATIONS)
    for result in figures["results"].values():
        for kind in ("predicted", "measured"):
            assert 1 <= result[kind]["expert_time_max_over_mean"] <= 2
            assert 0 < result[kind]["expert_seconds"] < math.inf
            assert 0 < result[kind]["step_seconds"] < math.inf
    assert asdict(Hardware.load(str(folder / "hardware.json"))) == figures["hardware"]


def test_benchmark_says_how_to_start_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulation"])
    with pytest.raises(SystemExit) as end:
        simulation.main()
    assert end.value.code == 2
    assert "torchrun --nproc-per-node 4 -m mohge.training.benchmarks.simulation" in capsys.readouterr().err
