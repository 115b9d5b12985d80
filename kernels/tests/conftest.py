"""Where the tests run: one thread for all, and Triton's interpreter where there is no GPU."""

import os
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version


if not torch.cuda.is_available():
    # Read by Triton when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


@pytest.fixture
def device(request, monkeypatch) -> str:
    """Device of the tensors for an implementation; the interpreter runs the Triton kernels on tensors on the CPU."""
    monkeypatch.delenv("MOHGE_KERNELS_DEBUG", raising=False)
    monkeypatch.delenv("MOHGE_KERNELS_INTERPRET", raising=False)
    if request.param == "interpreter":
        request.getfixturevalue("triton_interpreter")
        monkeypatch.setenv("MOHGE_KERNELS_INTERPRET", "1")
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(scope="session")
def triton_interpreter():
    """Skips where Triton is missing or compiles."""
    pytest.importorskip("triton", reason="needs triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, which is not set where there is a GPU")
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 fails with numpy 2.4 and later: pip install 'numpy<2.4'")
    from triton.runtime import interpreter

    # Triton's language is replaced by the interpreter's in every call of a function, which takes longer than most
    # functions. Here, where nothing compiles, it stays replaced after the first call from a module.
    replace_language, replaced = interpreter._patch_lang, set()

    def replace_once(function):
        if function.__module__ not in replaced:
            replaced.add(function.__module__)
            replace_language(function)
        return SimpleNamespace(restore=lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the Triton kernels that the interpreter runs; none where there is no Triton."""
    names = []
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return names
    launch = GridExecutor.__call__

    def recorded(executor, *args, **kwargs):
        names.append(executor.fn.__name__)
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    return names
