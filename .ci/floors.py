#!/usr/bin/env python3
"""
Print constraints for pip: the floor of every range in pyproject.toml. What has no floor there is left to pip. So is
torch, of whose older versions an index may have no CPU build: see TORCH in the Makefile.
"""

import re
from pathlib import Path


try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
    floor = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)[^;]*(;.*)?$", requirement)
    if floor and floor[1] != "torch":
        print(f"{floor[1]}=={floor[2]}{floor[3] or ''}")
