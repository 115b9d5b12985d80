"""The files that start training with experts on several devices: accelerate's configuration and a script."""

import os
import shlex
from pathlib import Path

import yaml


_SCRIPT = """\
#!/bin/sh
# {processes} processes: the experts are split over {devices} devices, replicas of these: {replicas}.
# Arguments are added to those below; --help lists them.
set -e
folder=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)
{environment}exec accelerate launch --config_file "$folder/accelerate.yaml" -m mohge.training.pretrain \\
    --model {model} --ep_size {devices} --fsdp_size {devices} --dp_replicate_size {replicas} "$@"
"""


def write_launch_files(folder: Path, place: Path, source: str, devices: int, replicas: int, device_type: str):
    """
    Write `accelerate.yaml` and `launch.sh`.

    Args:
        folder (`Path`): Existing folder to write into.
        place (`Path`): Where the folder will be: the script finds a local `source` by its path from there.
        source (`str`): A config.json, a model folder or a Hub id.
        devices (`int`): Devices that share the experts.
        replicas (`int`): Copies of these.
        device_type (`str`): `"cpu"` or `"cuda"`.
    """
    settings = yaml.safe_load((Path(__file__).parents[1] / "accelerate" / f"{device_type}.yaml").read_text("utf-8"))
    settings["num_processes"] = devices * replicas
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    model = shlex.quote(source)
    if Path(source).exists():
        model = '"$folder"/' + shlex.quote(os.path.relpath(Path(source).resolve(), place.resolve()))
    script = folder / "launch.sh"
    script.write_text(
        _SCRIPT.format(
            processes=devices * replicas,
            devices=devices,
            # With a configuration for CPU alone accelerate makes no process group.
            environment="export ACCELERATE_USE_CPU=1\n" if device_type == "cpu" else "",
            model=model,
            replicas=replicas,
        ),
        encoding="utf-8",
    )
    script.chmod(0o755)


__all__ = ["write_launch_files"]
