"""A checkpoint carries its own code: it loads with `trust_remote_code=True` where the package is not installed."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from processes import WITHOUT_PACKAGE, run_python
from transformers import AutoModelForCausalLM

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.versions_mohge import OLDEST_SERVING_TRANSFORMERS


SERVING_PYTHON = os.environ.get("SERVING_PYTHON")
"""A Python with the oldest transformers that runs checkpoints, but does not train them."""
CONFIGS = {
    "two_level": {"per_layer_config": {1: {"moe_intermediate_sizes": [16, 32, 64]}}, "shared_expert_gate": True},
    "top_p": {
        "router_type": "top_p",
        "moe_intermediate_sizes": [0, 16, 24],
        "backbone_config": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    },
    "grouped_top_k": {
        "router_type": "grouped_top_k",
        "router_logit_ema_strength": 0.5,
        "tie_word_embeddings": True,
    },
    "source": {
        "backbone_config": {
            "model_type": "olmoe",
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 4,
        },
        "per_layer_config": {1: {"moe_intermediate_sizes": [0, 0, 0]}},
        "num_experts_per_tok": None,
        "shared_expert_intermediate_size": None,
    },
}


LOAD = """
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

torch.set_num_threads(1)
report = {}
for path in map(Path, sys.argv[1:]):
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    base = AutoModel.from_pretrained(path, trust_remote_code=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True, num_labels=3)
    expected = torch.load(path / "expected.pt")
    logits = {}
    with torch.no_grad():
        for implementation in ("grouped_mm", "eager", "batched_mm"):
            model.set_experts_implementation(implementation)
            logits[implementation] = model(expected["input_ids"]).logits
        model.set_experts_implementation("mohge")  # the default, here without its kernels
        without_kernels = model(expected["input_ids"]).logits
        base.set_experts_implementation("eager")
        hidden = base(expected["input_ids"]).last_hidden_state
        classifier.set_experts_implementation("eager")
        scores = classifier(expected["input_ids"][:1]).logits
        generated = [
            model.generate(expected["input_ids"], max_new_tokens=4, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
    model.train()
    loss = model(expected["input_ids"], labels=expected["input_ids"]).loss
    loss.backward()
    again = path / "again"
    model.eval().save_pretrained(again)
    report[path.name] = {
        "version": transformers.__version__,
        "modules": [type(x).__module__ for x in (config, model, base)],
        "classes": [type(x).__name__ for x in (config, model, base)],
        "same_logits": {name: torch.equal(value, expected["logits"][name]) for name, value in logits.items()},
        "falls_back": torch.equal(without_kernels, expected["logits"]["grouped_mm"]),
        "same_hidden": torch.allclose(model.lm_head(hidden), expected["logits"]["eager"], rtol=1e-4, atol=1e-5),
        "same_scores": torch.allclose(scores, classifier.score(hidden[:1, -1]), rtol=1e-4, atol=1e-5),
        "same_tokens": all(torch.equal(tokens, expected["generated"]) for tokens in generated),
        "loss": loss.item(),
        "without_gradient": [name for name, p in model.named_parameters() if p.grad is None],
        "saved_again": sorted(file.name for file in again.glob("*.py")),
        "imported": "mohge" in sys.modules,
    }
print(json.dumps(report))
"""


BESIDE_PACKAGE = """
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

torch.set_num_threads(1)
package_first, *paths = sys.argv[1:]
if package_first == "True":
    import mohge
report = {}
for path in map(Path, paths):
    expected = torch.load(path / "expected.pt")
    copied = get_class_from_dynamic_module("modeling_mohge.MoHGEForCausalLM", path).from_pretrained(path)
    import mohge

    installed = AutoModelForCausalLM.from_pretrained(path)
    report[path.name] = {"modules": [type(model).__module__ for model in (copied, installed)]}
    for which, model in (("copied", copied), ("installed", installed)):
        with torch.no_grad():
            logits = model(expected["input_ids"]).logits
            model.set_experts_implementation("grouped_mm")
            grouped = model(expected["input_ids"]).logits
            model.set_experts_implementation("mohge")
        forward = model.model.layers[0].mlp.experts.forward
        inputs = torch.randn(5, 32), torch.arange(15).view(5, 3) % 12, torch.ones(5, 3)
        output = torch.compile(forward, fullgraph=True, backend="aot_eager")(*inputs)
        eager = forward(*inputs)
        report[path.name][which] = {
            "same_logits": torch.equal(logits, expected["logits"]["mohge"])
            and torch.equal(grouped, expected["logits"]["grouped_mm"]),
            "compiled": torch.allclose(output, eager, rtol=1e-4, atol=1e-6) and bool(eager.abs().max() > 1e-4),
        }
print(json.dumps(report))
"""


GENERATE = """
import json
import sys

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
report = []
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    ids = torch.arange(1, 10)[None]
    for use_cache in (True, False):
        report.append(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache).tolist())
print(json.dumps(report))
"""

SAVE_AGAIN = """
import sys

from mohge import MoHGEForCausalLM

while len(sys.argv) > 1:
    MoHGEForCausalLM.from_pretrained(sys.argv.pop(1)).save_pretrained(sys.argv.pop(1))
print("{}")
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Saved models, each with the logits of its inputs. The expected values are those of a loaded model too: the
    alignment of mapped memory decides how a matrix product rounds."""
    folder = tmp_path_factory.mktemp("checkpoints")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    paths = {}
    for name, kwargs in CONFIGS.items():
        torch.manual_seed(0)
        shape = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "moe_intermediate_sizes": [8, 24, 40],
            "num_experts_per_group": [2, 4, 6],
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 16,
        }
        config = MoHGEConfig(**shape | kwargs)
        model = MoHGEForCausalLM(config)
        for router in model.routers:
            if router.corrects_logits:
                router.logit_ema_E.normal_()
        path = paths[name] = folder / name
        model.save_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        assert isinstance(model, MoHGEForCausalLM)
        input_ids = torch.randint(1, 64, (2, 9))
        logits = {}
        with torch.no_grad():
            for implementation in ("mohge", "grouped_mm", "eager", "batched_mm"):
                model.set_experts_implementation(implementation)
                logits[implementation] = model(input_ids).logits
            generated = model.generate(input_ids, max_new_tokens=4, do_sample=False)
        loss = model.train()(input_ids, labels=input_ids).loss.item()
        expected = {"input_ids": input_ids, "logits": logits, "generated": generated, "loss": loss}
        torch.save(expected, path / "expected.pt")
    torch.set_num_threads(threads)
    return paths


def test_checkpoint_has_all_its_code(checkpoints):
    for path in checkpoints.values():
        auto_map = json.loads((path / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "configuration_mohge.MoHGEConfig",
            "AutoModel": "modeling_mohge.MoHGEModel",
            "AutoModelForCausalLM": "modeling_mohge.MoHGEForCausalLM",
            "AutoModelForSequenceClassification": "modeling_mohge.MoHGEForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_mohge.MoHGEForTokenClassification",
        }
        files = {file.name for file in path.glob("*.py")}
        assert {"configuration_mohge.py", "modeling_mohge.py"} <= files
        # Every module that a copied file imports from beside itself was copied too.
        for name in files:
            for line in (path / name).read_text().splitlines():
                if line.startswith("from ."):
                    assert line.split()[1].removeprefix(".") + ".py" in files, (name, line)


@pytest.mark.parametrize("python", [sys.executable, SERVING_PYTHON], ids=["here", "serving"])
def test_loads_where_the_package_is_not_installed(python, checkpoints, tmp_path):
    if python is None:
        pytest.skip("SERVING_PYTHON names no environment with the oldest transformers that serves checkpoints")
    report = run_python(WITHOUT_PACKAGE + LOAD, tmp_path, *checkpoints.values(), python=python)
    assert report.keys() == checkpoints.keys()
    for name, path in checkpoints.items():
        loaded = report[name]
        if python is SERVING_PYTHON:
            assert loaded["version"].startswith(f"{OLDEST_SERVING_TRANSFORMERS}.")
        assert all(module.startswith("transformers_modules.") for module in loaded["modules"]), loaded["modules"]
        assert not loaded["imported"]
        assert loaded["classes"] == ["MoHGEConfig", "MoHGEForCausalLM", "MoHGEModel"]
        assert loaded["same_logits"] == dict.fromkeys(("grouped_mm", "eager", "batched_mm"), True)
        assert loaded["falls_back"]
        assert loaded["same_hidden"]
        assert loaded["same_scores"]
        assert loaded["same_tokens"]
        assert loaded["loss"] == pytest.approx(torch.load(path / "expected.pt")["loss"], rel=1e-6)
        assert loaded["without_gradient"] == []
        assert "modeling_mohge.py" in loaded["saved_again"]  # a fine-tuned copy can be shared on


@pytest.mark.parametrize("package_first", [True, False], ids=["package_first", "copy_first"])
def test_copy_and_installed_package_in_one_process(package_first, checkpoints, tmp_path):
    """Both register the same operators, whatever the config: after the first order, two are enough."""
    names = [*CONFIGS] if package_first else ["two_level", "source"]
    report = run_python(BESIDE_PACKAGE, tmp_path, package_first, *(checkpoints[name] for name in names))
    assert [*report] == names
    for loaded in report.values():
        copied, installed = loaded["modules"]
        assert copied.startswith("transformers_modules.")
        assert installed == "mohge.modeling_mohge"
        assert loaded["copied"] == loaded["installed"] == {"same_logits": True, "compiled": True}


def test_folders_travel_between_the_newest_and_the_oldest_versions(checkpoints, tmp_path):
    """Between the environments of `make test` and `make test-floor`, one of which runs this."""
    root = Path(__file__).parents[2]
    here = Path(sys.prefix)
    there = root / {".venv": ".venv-floor", ".venv-floor": ".venv"}.get(here.name, "")
    if here.parent != root or not (there / "installed").exists():
        pytest.skip("needs both environments, of `make test` and of `make test-floor`, and to run in one of them")
    other = there / "bin" / "python"
    moved = {path: tmp_path / path.name for path in checkpoints.values()}
    run_python(SAVE_AGAIN, tmp_path, *(path for pair in moved.items() for path in pair), python=other)
    assert all((path / "modeling_mohge.py").exists() for path in moved.values())
    expected = []
    for path in checkpoints.values():
        model = MoHGEForCausalLM.from_pretrained(path)
        tokens = model.generate(torch.arange(1, 10)[None], max_new_tokens=8, do_sample=False).tolist()
        expected += [tokens, tokens]  # with a cache and without
    folders = [*checkpoints.values(), *moved.values()]
    for python in (sys.executable, other):
        assert run_python(WITHOUT_PACKAGE + GENERATE, tmp_path, *folders, python=python) == expected * 2
