"""The files that start training with experts on several devices: accelerate's configuration and a script."""

import os
import shlex
from pathlib import Path

import yaml

from .costs import Workload


_SCRIPT = """\
#!/bin/sh
# {processes} processes: the experts are split over {devices} devices, replicas of these: {replicas}.
# Arguments are added to those below; --help lists them. For several machines set num_machines in accelerate.yaml, and
# on each of them LAUNCH="--machine_rank 0 --main_process_ip ADDRESS".
set -e
folder=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)
exec accelerate launch --config_file "$folder/accelerate.yaml" ${{LAUNCH-}} -m mohge train \\
    --model {model} --ep_size {devices} --fsdp_size {devices} --dp_replicate_size {replicas} \\
    {arguments} "$@"
"""


def write_launch_files(
    folder: Path,
    place: Path,
    source: str,
    workload: Workload,
    sequence_length: int,
    replicas: int,
    device_type: str,
):
    """
    Write `accelerate.yaml` and `launch.sh`.

    Args:
        folder (`Path`): Existing folder to write into.
        place (`Path`): Where the folder will be: the script finds a local `source` by its path from there.
        source (`str`): A config.json, a model folder or a Hub id.
        workload ([`Workload`]): How the model is to be trained.
        sequence_length (`int`): Tokens of a sequence; a device takes as many as its tokens of a step make up.
        replicas (`int`): Copies of the devices that share the experts.
        device_type (`str`): `"cpu"` or `"cuda"`.
    """
    settings = yaml.safe_load((Path(__file__).parents[1] / "accelerate" / f"{device_type}.yaml").read_text("utf-8"))
    settings["num_processes"] = workload.devices * replicas
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    model = shlex.quote(source)
    if Path(source).exists():
        model = '"$folder"/' + shlex.quote(os.path.relpath(Path(source).resolve(), place.resolve()))
    arguments = {
        "dtype": str(workload.dtype).removeprefix("torch."),
        "sequence_length": sequence_length,
        "per_device_train_batch_size": max(1, workload.tokens // sequence_length),
    }
    if workload.gradient_checkpointing:
        arguments["gradient_checkpointing"] = True
    if device_type == "cpu":
        arguments["use_cpu"] = True
    script = folder / "launch.sh"
    script.write_text(
        _SCRIPT.format(
            processes=workload.devices * replicas,
            devices=workload.devices,
            model=model,
            replicas=replicas,
            arguments=" ".join(f"--{name} {value}" for name, value in arguments.items()),
        ),
        encoding="utf-8",
    )
    script.chmod(0o755)


__all__ = ["write_launch_files"]
