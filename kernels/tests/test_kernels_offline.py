"""The Triton kernels, compiled for an H200 that need not be there: no spilled registers, and the instructions that
make them fast."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import mohge_kernels


triton = pytest.importorskip("triton", reason="needs triton")
if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    pytest.skip("Triton compiles on Linux on x86-64 and aarch64", allow_module_level=True)
for tool in ("ptxas", "cuobjdump"):
    try:
        getattr(triton.knobs.nvidia, tool)
    except RuntimeError:
        pytest.skip(f"needs Triton's {tool}", allow_module_level=True)


SHARED_MEMORY = 232448
"""Bytes that a program may have on compute capability 9.0."""

MATRIX_PRODUCTS = {
    "up_kernel",
    "up_kernel again",
    "up_kernel saving nothing",
    "rows_kernel down",
    "rows_kernel gate_up",
    "d_activation_kernel",
    "d_weights_kernel",
}
OTHERS = {"route_kernel", "route_backward_kernel", "combine_kernel forward", "combine_kernel backward"}
SORT_OF_MANY = {"_rank_kernel", "_prefix_kernel", "_place_kernel"}
SORT_OF_FEW = {"_sort_kernel"}


CASES = {
    "paper-bfloat16-32768": (SORT_OF_MANY, "wgmma"),
    "paper-bfloat16-32": (SORT_OF_FEW, "mma"),
    "large-bfloat16-32768": (SORT_OF_MANY, "wgmma"),
    "paper-float32-32768": (SORT_OF_MANY, None),
    "many-bfloat16-32768": (SORT_OF_MANY, "wgmma"),
    "odd-bfloat16-32768": (SORT_OF_MANY, None),
}


@pytest.fixture(scope="module")
def compiled() -> subprocess.CompletedProcess:
    """In a process of its own: this one's kernels may be for the interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(Path(mohge_kernels.__file__).parents[1]), *filter(None, [inherited.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, "-m", "mohge_kernels.offline", *CASES, "--json"],
        env={**inherited, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert process.stdout, process.stderr
    return process


@pytest.mark.parametrize("case", CASES)
def test_kernels_fit_the_multiprocessor(case, compiled):
    sort, tensor_cores = CASES[case]
    results = json.loads(compiled.stdout)
    assert results.keys() == CASES.keys()
    kernels = results[case]
    assert [kernel for kernel in kernels if kernel["spilled"]] == []
    assert [kernel for kernel in kernels if kernel["shared_memory"] > SHARED_MEMORY] == []
    assert compiled.returncode == 0

    names = [kernel["kernel"] for kernel in kernels]
    assert sorted(names) == sorted(MATRIX_PRODUCTS | OTHERS | sort)
    if tensor_cores:  # otherwise the layer is not there for speed
        for kernel in kernels:
            if kernel["kernel"] in MATRIX_PRODUCTS:
                assert (kernel["tensor_cores"], kernel["wide_loads"]) == (tensor_cores, 1), kernel


@pytest.mark.parametrize(
    ("arguments", "environment", "remedy"),
    [
        (["huge"], {}, "choose from paper-bfloat16-32768, "),
        ([], {"TRITON_INTERPRET": "1"}, "unset it"),
    ],
)
def test_bad_usage_is_refused(arguments, environment, remedy, monkeypatch, capsys):
    from mohge_kernels import offline  # imports Triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        offline.main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert remedy in printed.err.splitlines()[-1]
