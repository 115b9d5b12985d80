"""
Speed of MoHGE against transformers' OLMoE, side by side in one process: `python -m mohge.training.benchmarks.step`.

Both models have the same hidden size, layers, attention, number of experts and K; OLMoE's experts all have MoHGE's
mean width, so the routed experts of both hold the same parameters and do the same work at equal traffic; what a token
uses as routed is printed beside. Results are checked before anything is timed, the contestants alternate, and medians
are printed.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import OlmoeConfig, OlmoeForCausalLM

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.blocks_mohge import MoHGESparseMoeBlock
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.info import counts_as_routed, parameter_counts
from mohge.training.benchmarks.machine import processor
from mohge.training.report.measure import evaluate_routing


def main() -> None:
    """Parse the arguments, check, measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--widths", default="192,256,320,384,448,512,576,640", help="widths of the groups")
    parser.add_argument("--experts-per-group", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a training step, in sequences of 256")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded per measurement, batch size 1")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-tokens", type=int, default=8192, help="tokens of the step whose memory is measured")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write all quantiles to")
    options = parser.parse_args()

    torch.manual_seed(0)
    models = _models(options)
    _check(models, options)
    sizes = {name: _sizes(model, _batch(options)) for name, model in models.items()}
    for name, (total, used) in sizes.items():
        print(f"{name}: {total:,} parameters, {used:,} used by a token as routed")
    measurements = {
        "training step": _measure(
            # with router logits OLMoE adds its load-balancing loss; MoHGE adds its own in any case
            {name: _training_step(m, options, router_logits=name == "OLMoE") for name, m in models.items()},
            options,
        ),
        "decode": _measure({name: _decode(m, options) for name, m in models.items()}, options),
        "layer, forward": _measure(_layer_parts(models, options, backward=False), options),
        "layer, forward + backward": _measure(_layer_parts(models, options, backward=True), options),
    }
    _print(measurements, options)
    memory = _memory(options)
    if options.json:
        record = {**_record(measurements, options), "peak_bytes": memory, "parameters_total_and_used": sizes}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def peak_memory(model: torch.nn.Module, batch: torch.Tensor, router_outputs: bool) -> int:
    """
    Most bytes that are allocated at the same time by one training step, beside the model and its gradients, with
    router losses and router logits or with neither.
    """
    if not router_outputs:
        for field in ROUTER_COEFFICIENTS.values():
            setattr(model.config, field, 0.0)
    model.train()

    def step(batch: torch.Tensor):
        model(batch, labels=batch, output_router_logits=router_outputs).loss.backward()

    step(batch[:1])  # makes the gradients
    if batch.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _memory(options) -> dict[str, int]:
    """Peak bytes of a training step, of OLMoE, and of MoHGE without and with router losses and logits."""
    batch = _batch(options, options.memory_tokens)
    contestants = {"OLMoE": ("OLMoE", True)}
    contestants |= {f"two_level {which}": ("MoHGE two_level", which == "with") for which in ("without", "with")}
    peaks = {
        label: peak_memory(_models(options)[name], batch, outputs) for label, (name, outputs) in contestants.items()
    }
    olmoe, without, with_outputs = (peak / 2**20 for peak in peaks.values())
    print(
        f"\npeak memory of a step of {options.memory_tokens} tokens beside weights and gradients: OLMoE {olmoe:.0f} "
        f"MiB with router losses and logits, two_level {without:.0f} MiB without and {with_outputs:.0f} MiB with them "
        f"({with_outputs / without - 1:+.2%})"
    )
    return peaks


def _models(options) -> dict[str, torch.nn.Module]:
    widths = [int(width) for width in options.widths.split(",")]
    backbone = OlmoeConfig(
        vocab_size=4096,
        hidden_size=options.hidden_size,
        intermediate_size=sum(widths) // len(widths),
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_experts=len(widths) * options.experts_per_group,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        pad_token_id=None,
        eos_token_id=None,
    )
    grouped = {
        "backbone_config": backbone,
        "moe_intermediate_sizes": widths,
        "num_experts_per_group": options.experts_per_group,
        "num_experts_per_tok": options.top_k,
        "shared_expert_intermediate_size": 0,
    }
    built = {
        "OLMoE": OlmoeForCausalLM(backbone),
        "MoHGE two_level": MoHGEForCausalLM(MoHGEConfig(router_type="two_level", **grouped)),
        "MoHGE top_k": MoHGEForCausalLM(
            MoHGEConfig(router_type="top_k", router_aux_loss_coef=0.01, router_expert_aux_loss_coef=0.0, **grouped)
        ),
    }
    return {name: m.to(options.device, getattr(torch, options.dtype)) for name, m in built.items()}


def _sizes(model: torch.nn.Module, batch: torch.Tensor) -> tuple[int, int]:
    """Parameters in all, and those that a token of the batch passes through."""
    config = model.config
    if isinstance(config, MoHGEConfig):
        routing = evaluate_routing(model, [{"input_ids": batch}]).statistics.routing("the batch")
        used = counts_as_routed(config, routing.tokens_per_expert, routing.tokens).activated
    else:  # OLMoE, whose experts have one width
        experts = {"moe_intermediate_sizes": [config.intermediate_size], "num_experts_per_group": config.num_experts}
        used = parameter_counts(MoHGEConfig(backbone_config=config, **experts)).activated
    return model.num_parameters(), used


def _batch(options, tokens: int | None = None) -> torch.Tensor:
    tokens = tokens or options.tokens
    return torch.randint(0, 4096, (max(1, tokens // 256), min(256, tokens)), device=options.device)


def _check(models: dict[str, torch.nn.Module], options) -> None:
    """Each model's default experts implementation must agree with its eager one."""
    batch = _batch(options)[:1]
    for name, model in models.items():
        fast = model.config._experts_implementation
        with torch.no_grad():
            logits = model(batch).logits.float()
            model.set_experts_implementation("eager")
            expected = model(batch).logits.float()
        model.set_experts_implementation(fast)
        error = float((logits - expected).norm() / expected.norm())
        print(f"check: {name}, {fast} against eager: relative error {error:.1e}")
        if not error < (1e-5 if options.dtype == "float32" else 2e-2):
            raise SystemExit(1)


def _training_step(model: torch.nn.Module, options, router_logits: bool) -> Callable[[], int]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> int:
        model.train()
        batch = _batch(options)
        model(batch, labels=batch, output_router_logits=router_logits).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return batch.numel()

    return step


def _decode(model: torch.nn.Module, options) -> Callable[[], int]:
    def generate() -> int:
        model.eval()
        prompt = _batch(options)[:1, :1]  # of one token, so that every step is a decoding step
        # Sampled: greedily, an untrained model repeats a token, and with it the widths of that token's experts.
        tokens = model.generate(
            prompt, max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens, do_sample=True, top_k=0
        )
        return tokens.shape[1] - 1

    return generate


def _layer_parts(models: dict[str, torch.nn.Module], options, backward: bool) -> dict[str, Callable[[], int]]:
    """The mixture layer and its router alone, of both routers."""
    tokens = _batch(options).numel()
    parts = {}
    for name in ("MoHGE two_level", "MoHGE top_k"):
        block: MoHGESparseMoeBlock = models[name].model.layers[0].mlp
        for part, module in (("layer", block), ("router", block.gate)):
            parts[f"{name}, {part}"] = _run_module(module, tokens, options, backward)
    return parts


def _run_module(module: torch.nn.Module, tokens: int, options, backward: bool) -> Callable[[], int]:
    dtype = getattr(torch, options.dtype)

    def run() -> int:
        shape = (1, tokens, options.hidden_size)
        hidden_states = torch.randn(shape, device=options.device, dtype=dtype, requires_grad=backward)
        with torch.set_grad_enabled(backward):
            output = module(hidden_states if isinstance(module, MoHGESparseMoeBlock) else hidden_states[0])
        if backward:
            output = output if isinstance(output, torch.Tensor) else output.weights
            output.backward(torch.randn_like(output))
        return tokens

    return run


def _measure(contestants: dict[str, Callable[[], int]], options) -> dict[str, list[float]]:
    """Seconds per token of each contestant, `repeats` times in turn, after three warm-up rounds."""
    seconds = {name: [] for name in contestants}
    for repeat in range(options.repeats + 3):
        for name, run in contestants.items():
            _synchronize(options)
            start = time.perf_counter()
            tokens = run()
            _synchronize(options)
            if repeat >= 3:
                seconds[name].append((time.perf_counter() - start) / tokens)
    return seconds


def _synchronize(options) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


def _print(measurements: dict[str, dict[str, list[float]]], options) -> None:
    print(f"\n{json.dumps(_machine(options))}")
    print(
        f"hidden {options.hidden_size}, {options.layers} layers, widths {options.widths} x {options.experts_per_group}"
    )
    print(f"\n{'tokens/s, median':<20}{'OLMoE':>10}{'two_level':>12}{'ratio':>22}{'top_k':>10}{'ratio':>22}")
    for name in ("training step", "decode"):
        seconds, columns = measurements[name], []
        olmoe = seconds["OLMoE"]
        for who in ("MoHGE two_level", "MoHGE top_k"):
            low, middle, high = _deciles([theirs / ours for theirs, ours in zip(olmoe, seconds[who], strict=True)])
            ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            columns.append(f"{1 / statistics.median(seconds[who]):>12.1f}{ratio:>22}")
        print(f"{name:<20}{1 / statistics.median(olmoe):>10.1f}{''.join(columns)}")
    print(f"\n{'ms per ' + str(options.tokens) + ' tokens':<28}{'two_level':>12}{'top_k':>12}{'extra / layer':>16}")
    for name in ("layer, forward", "layer, forward + backward"):
        time_of = {who: statistics.median(v) * options.tokens * 1e3 for who, v in measurements[name].items()}
        for part in ("layer", "router"):
            two_level, top_k = time_of[f"MoHGE two_level, {part}"], time_of[f"MoHGE top_k, {part}"]
            extra = (two_level - top_k) / time_of["MoHGE top_k, layer"]
            label = f"{name.replace('layer', part)}"
            print(f"{label:<28}{two_level:>12.2f}{top_k:>12.2f}{extra:>15.1%}")


def _machine(options) -> dict[str, str]:
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else processor()
    return {
        "device": f"{device}, {torch.get_num_threads()} threads",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _record(measurements: dict[str, dict[str, list[float]]], options) -> dict:
    quantiles = {
        name: {
            who: dict(zip(("p10", "p50", "p90"), _deciles(values), strict=True)) for who, values in contestants.items()
        }
        for name, contestants in measurements.items()
    }
    arguments = {name: str(value) for name, value in vars(options).items() if name != "json"}
    return {"machine": _machine(options), "arguments": arguments, "seconds_per_token": quantiles}


def _deciles(values: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[4], cuts[8]


if __name__ == "__main__":
    main()
