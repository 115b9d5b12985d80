"""Python in processes of its own, where the package may be missing."""

import json
import os
import subprocess
import sys
from pathlib import Path


WITHOUT_PACKAGE = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mohge", "mohge_kernels"):
            raise ImportError(f"{name} is not installed here")


missing = Missing()
sys.meta_path.insert(0, missing)
"""


def run_python(code: str, home: Path, *arguments, python: str | Path = sys.executable) -> dict | list:
    """Run `code` isolated and offline. The JSON on the last line of its output."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [python, "-I", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
