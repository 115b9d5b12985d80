"""Runs of sharded models on several ranks and of the same models on one."""

import faulthandler
import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from model_cases import make_ids
from parallel_cases import SCENARIOS, Scenario
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mohge import MoHGEConfig


SECONDS = 240
"""More than any scenario takes: after that, a rank that hangs prints where, and ends."""


def train_step(scenario: Scenario, folder: Path) -> dict:
    model = scenario.load(folder).train()
    if scenario.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    held = {name: _local(p).detach().clone() for name, p in model.named_parameters()}
    outputs, share = _training_pass(scenario, model)
    (outputs.loss * scenario.parts).backward()  # gradients are averaged over the parts
    model.set_training_progress(1.0)
    sharding = getattr(model.config, "distributed_config", None)
    return {
        "implementation": None if sharding is None else sharding.ep_implementation,
        "held": held,
        "logits": _without_padding(scenario, outputs.logits),
        "loss": outputs.loss.detach(),
        "aux_loss": outputs.aux_loss.detach(),
        "router_losses": {name: value * share for name, value in outputs.router_losses.items()},
        "tokens_per_expert": list(outputs.tokens_per_expert),
        "logit_means": [router.logit_ema_E for router in model.routers if router.corrects_logits],
        "gradients": {name: None if p.grad is None else _full(p.grad) for name, p in model.named_parameters()},
        "waiting": [name for name, module in model.named_modules() if getattr(module, "meanwhile", None) is not None],
    }


def exchanges(scenario: Scenario, folder: Path) -> dict:
    """Type and shape of what this rank sends in each all-to-all, and how often its tokens chose each expert."""
    model = scenario.load(folder).train()
    with _AllToAlls() as forward:
        outputs, _ = _training_pass(scenario, model)
    with _AllToAlls() as backward:
        outputs.loss.backward()
    counts = list(outputs.tokens_per_expert)
    return {"forward": forward.sent, "backward": backward.sent, "tokens_per_expert": counts}


def evaluate(scenario: Scenario, folder: Path) -> dict:
    return _evaluate(scenario, scenario.load(folder))


def adapted(scenario: Scenario, folder: Path) -> dict:
    """With an adapter on attention."""
    return _evaluate(scenario, PeftModel.from_pretrained(scenario.load(folder), folder / "adapter"))


def generate(scenario: Scenario, folder: Path) -> dict:
    model = scenario.load(folder).eval()
    settings = {"max_new_tokens": 10, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return {"tokens": [model.generate(make_ids(rows, 6), **settings) for rows in (1, 3)]}


def save(scenario: Scenario, folder: Path) -> dict:
    """What stands in the checkpoint that the ranks save together; in one process, in the one they load."""
    saved = folder / scenario.model
    if dist.is_initialized():
        model = scenario.load(folder)
        saved = scenario.saved(folder)
        model.save_pretrained(saved)
    return {
        "config": MoHGEConfig.get_config_dict(saved)[0],
        "weights": load_file(saved / "model.safetensors"),
        "files": sorted(path.name for path in saved.iterdir()),
    }


def _training_pass(scenario: Scenario, model: torch.nn.Module):
    """The outputs for this rank's rows, and these rows' share of all targets."""
    rows = scenario.own_rows()
    own, whole = ((batch["labels"][:, 1:] != -100).sum() for batch in (rows, scenario.batch()))
    with torch.autocast("cpu", torch.bfloat16, enabled=scenario.autocast):
        return model(**rows, num_items_in_batch=whole), own / whole


@torch.no_grad()
def _evaluate(scenario: Scenario, model: torch.nn.Module) -> dict:
    rows = scenario.own_rows()
    outputs = model.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    return {"logits": _without_padding(scenario, outputs.logits)}


def _without_padding(scenario: Scenario, logits: torch.Tensor) -> torch.Tensor:
    return _full(logits).detach()[scenario.own_rows()["attention_mask"].bool()]


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _AllToAlls(TorchDispatchMode):
    POSITION_OF_INPUT = {"c10d::alltoall_base_": 1, "_c10d_functional::all_to_all_single": 0}

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come here afterwards
        name = func.name()
        if "alltoall" in name or "all_to_all" in name:
            sent = args[self.POSITION_OF_INPUT[name]]
            self.sent.append((str(sent.dtype), tuple(sent.shape)))
        return func(*args, **(kwargs or {}))


def run(scenario: Scenario, folder: Path) -> dict:
    return globals()[scenario.run](scenario, folder)


def run_all(folder: Path):
    """Run all scenarios of so many ranks as there are, and leave the results of this one in `rank_N.pt`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=SECONDS / 4)  # for ranks whose partner has failed
    for number, (name, scenario) in enumerate(SCENARIOS[world_size].items()):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        # Each has a process group of its own, so that a rank that fails takes no other scenario with it.
        rendezvous = f"file://{folder}/rendezvous_{number}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        try:
            results[name] = run(scenario, folder)
            dist.barrier()
        except Exception:
            results[name] = traceback.format_exc()
        dist.destroy_process_group()
    torch.save(results, folder / f"rank_{rank}.pt")
