"""`mohge place`: what it prints and writes, and its exit status."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from model_cases import make_config
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from mohge import MoHGEConfig
from mohge.commands.main import main
from mohge.training.loop.traffic import RouterTraffic


RELEASE = str(Path(__file__).parents[3] / "model_cards" / "mohge-3b")


@pytest.fixture
def model(tmp_path) -> MoHGEConfig:
    """A small config, saved in `tmp_path / "a model"`."""
    config = make_config(num_experts_per_group=[4, 8, 12], mlp_only_layers=[0], vocab_size=300)
    config.save_pretrained(tmp_path / "a model")
    return config


def place(capsys, *arguments) -> str:
    assert main(["place", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_nothing_is_said_of_training_or_of_attention(capsys, model, tmp_path, caplog, new_warnings):
    with CaptureLogger(logging.get_logger("transformers")) as said:
        place(capsys, tmp_path / "a model", "--devices", 2)
    assert said.out == ""
    assert not caplog.records


def test_text_on_the_release(capsys):
    """Six experts of mean width 832 in 15 layers: 6 x 15 x 6 x 1024 x 832 operations per token. Each choice crosses to
    7 of 8 devices: 15 x 6 x 7/8 x 4 x 1024 numbers of 2 bytes."""
    printed = place(capsys, RELEASE, "--devices", 8, "--dtype", "bfloat16")
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows["all-size"][1] == "8"
    assert " ".join(rows["all-size"][6:]) == "460.06 M 460.06 M 1.000 645.12 kB 645.12 kB"
    assert rows["contiguous"][6:11] == ["460.06", "M", "707.79", "M", "1.538"]
    assert rows["packed"][1] == "9"
    assert printed.splitlines()[-1] == "fits on: 1, 2, 4, 8 devices"
    assert max(map(len, printed.splitlines())) < 120


def test_json_has_a_figure_for_every_device(capsys, model, tmp_path):
    report = json.loads(place(capsys, tmp_path / "a model", "--devices", 2, "--tokens", 100, "--format", "json"))
    assert report["fitting_devices"] == [1, 2, 4]
    assert (report["dtype"], report["sequence_length"], report["traffic"]) == ("float32", 64, None)
    assert set(report["allocations"]) == {"all-size", "contiguous", "paired", "packed"}
    for entry in report["allocations"].values():
        assert len(entry["experts"]) == 1  # one layer has experts
        assert sorted({expert for held in entry["experts"][0] for expert in held}) == list(range(24))
        lists = [entry[name] for name in ("parameters", "expert_parameters", "expert_flops", "all_to_all_bytes")]
        assert all(len(values) == 2 and min(values) > 0 for values in lists + list(entry["memory"].values()))
        assert entry["total_memory"] == [sum(sizes[r] for sizes in entry["memory"].values()) for r in range(2)]


def test_recorded_traffic_moves_the_packed_experts(capsys, model, tmp_path):
    traffic = RouterTraffic(model)
    hot = torch.ones(24)
    hot[5] = 200
    traffic.add([hot], tokens=200)
    traffic.save(tmp_path / "traffic.json")
    arguments = [tmp_path / "a model", "--devices", 4]
    assert "traffic: 200 recorded tokens" in place(capsys, *arguments, "--traffic", tmp_path / "traffic.json")
    arguments += ["--format", "json"]
    even = json.loads(place(capsys, *arguments))["allocations"]
    skewed = json.loads(place(capsys, *arguments, "--traffic", tmp_path / "traffic.json"))["allocations"]
    assert all(5 in held for held in skewed["packed"]["experts"][0])
    assert not all(5 in held for held in even["packed"]["experts"][0])
    assert skewed["packed"]["expert_flops_imbalance"] < 1.1 < 2 < skewed["all-size"]["expert_flops_imbalance"]


def test_options_change_the_memory(capsys, model, tmp_path):
    def memory(*options) -> dict[str, int]:
        arguments = [tmp_path / "a model", "--devices", 2, "--format", "json", *options]
        report = json.loads(place(capsys, *arguments))
        return {name: sizes[0] for name, sizes in report["allocations"]["all-size"]["memory"].items()}

    plain = memory()
    assert memory("--dtype", "bfloat16")["weights"] * 2 == plain["weights"]
    assert memory("--tokens", 8192)["activations"] == pytest.approx(2 * plain["activations"], rel=1e-6)
    assert memory("--gradient-checkpointing")["activations"] < plain["activations"]
    assert memory("--replicas", 3) == plain


def test_the_dtype_of_the_config_is_the_default(capsys, tmp_path):
    make_config(dtype="bfloat16").save_pretrained(tmp_path)
    assert json.loads(place(capsys, tmp_path, "--devices", 2, "--format", "json"))["dtype"] == "bfloat16"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_a_picture(suffix, capsys, model, tmp_path):
    path = tmp_path / f"placement.{suffix}"
    place(capsys, tmp_path / "a model", "--devices", 2, "--plot", path)
    if suffix == "png":
        assert matplotlib.image.imread(path).std() > 0.05  # not one colour
    else:
        assert re.search(r"<svg.*all-size", path.read_text(), re.DOTALL)


def launch(script: Path, folder: Path, *arguments) -> list[str]:
    """Run the script where `accelerate` prints what it is given, and return that."""
    folder.mkdir()
    accelerate = folder / "accelerate"
    accelerate.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    accelerate.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LAUNCH": "--machine_rank 0"}
    done = subprocess.run([script, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_launch_folder_works_from_anywhere(device, capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--tokens", 128, "--sequence-length", 32, "--dtype", "bfloat16", "--gradient-checkpointing")
    options += ("--replicas", 3, "--output", "runs/out put", "--device", device)
    printed = place(capsys, "a model", "--devices", 2, *options)
    assert printed.splitlines()[-1] == "written: runs/out put"
    target = tmp_path / "runs" / "out put"
    names = {"accelerate.yaml", "launch.sh", "placement.json", "placement.svg"}
    assert {path.name for path in target.iterdir()} == names
    assert list(target.parent.iterdir()) == [target]
    settings = load_config_from_file(str(target / "accelerate.yaml"))
    assert (settings.num_processes, settings.distributed_type) == (6, "MULTI_GPU")
    assert json.loads((target / "placement.json").read_text())["allocations"]["all-size"]["experts"]
    given = launch(target / "launch.sh", tmp_path / "elsewhere", "--max_steps", "5 6")
    assert given[:3] == ["launch", "--config_file", f"{target}/accelerate.yaml"]
    assert given[3:8] == ["--machine_rank", "0", "-m", "mohge", "train"]
    options = dict(zip(given[8::2], given[9::2], strict=True))
    assert Path(options.pop("--model")).resolve() == tmp_path / "a model"
    assert options.pop("--use_cpu", "False") == str(device == "cpu")
    assert options == {
        **{"--ep_size": "2", "--fsdp_size": "2", "--dp_replicate_size": "3", "--dtype": "bfloat16"},
        **{"--sequence_length": "32", "--per_device_train_batch_size": "4", "--gradient_checkpointing": "True"},
        "--max_steps": "5 6",
    }


def test_launch_script_trains(capsys, model, tmp_path):
    """As a user would: what is launched is what was placed."""
    folder, output = tmp_path / "a model", tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(400)))
    options = ("--tokens", 64, "--sequence-length", 32, "--device", "cpu")
    place(capsys, folder, "--devices", 2, *options, "--output", tmp_path / "launch")
    arguments = ["--datasets", text, "--output_dir", output, "--max_steps", 2, "--report_to", "none"]
    done = subprocess.run(
        [tmp_path / "launch" / "launch.sh", *map(str, arguments)],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    traffic = RouterTraffic.load(output / "traffic.json")
    assert traffic.tokens == [64] * 4  # two steps on two devices
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "3"], "--devices 3 does not divide the 4 sets of experts: use 2 or 4 (1, 2, 4 fit)"),
        (["--devices", "0"], "--devices is 0"),
        (["--devices", "2", "--replicas", "0"], "--replicas is 0"),
        (["--devices", "2", "--tokens", "-1"], "--tokens is -1"),
        (["--devices", "2", "--sequence-length", "0"], "--sequence-length is 0"),
        (["--devices", "2", "--plot", "plot.txt"], "neither .png nor .svg"),
        (["--devices", "2", "--output", "a model"], "--output a model exists"),
        (["--devices", "2", "--traffic", "none.json"], "none.json"),
        (["--devices", "2", "--traffic", "a model/config.json"], "no recorded traffic"),
        (["--devices", "2", "--traffic", "other.json"], "recorded with other experts"),
        (["--devices", "2", "--plot", "no folder/plot.png"], "no folder"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = RouterTraffic(make_config())
    other.add([torch.ones(12)] * 2, tokens=4)
    other.save("other.json")
    before = sorted(tmp_path.iterdir())
    assert main(["place", "a model", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_without_experts_is_refused(capsys, tmp_path):
    make_config(mlp_only_layers=[0, 1]).save_pretrained(tmp_path)
    assert main(["place", str(tmp_path), "--devices", "1"]) == 2
    assert "`mlp_only_layers`" in capsys.readouterr().err
