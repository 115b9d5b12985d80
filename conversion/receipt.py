"""What a conversion kept: measured against the source, as JSON and as a table."""

import math

import torch
import torch.nn.functional as F

from mohge import MoHGEConfig
from mohge.info import counts_as_routed, parameter_counts
from mohge.model_cards.records import checked_text

from .calibration import Tokens
from .plan import Plan
from .tokenizer import describe


EXACT = 1e-5
"""Largest relative error, in float32, of a conversion that is exact."""


class LogitComparison:
    """Sums over held-out tokens of what the logits of two models have in common."""

    def __init__(self):
        self.errors: list[torch.Tensor] = []
        self.kl = self.agreement = 0.0
        self.losses = [0.0, 0.0]
        self.tokens = self.targets = 0

    def add(self, targets_T: torch.Tensor, before_TV: torch.Tensor, after_TV: torch.Tensor):
        """Take in the logits of source and result for some tokens, and the tokens that follow, -100 for none."""
        self.errors.append((after_TV - before_TV).norm(dim=-1) / before_TV.norm(dim=-1))
        self.agreement += (before_TV.argmax(-1) == after_TV.argmax(-1)).sum().item()
        log_p, log_q = before_TV.log_softmax(-1), after_TV.log_softmax(-1)
        self.kl += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
        self.tokens += len(targets_T)
        self.targets += (targets_T >= 0).sum().item()
        for which, log_probabilities in enumerate((log_p, log_q)):
            self.losses[which] += F.nll_loss(log_probabilities, targets_T, reduction="sum").item()

    def result(self, text: bool) -> dict:
        """The means; perplexities only of text."""
        errors = torch.cat(self.errors)
        perplexities = [math.exp(min(loss / self.targets, 700)) if text else None for loss in self.losses]
        return {
            "relative_error_median": errors.median().item(),
            "relative_error_max": errors.max().item(),
            "kl": 0.0 if self.kl < 0 else self.kl / self.tokens,  # below zero by rounding
            "top1_agreement": self.agreement / self.tokens,
            "perplexity_before": perplexities[0],
            "perplexity_after": perplexities[1],
        }


def make_report(
    plan: Plan,
    tokens: Tokens,
    fitted_tokens: int,
    size: int,
    layers: list[dict],
    logits: dict,
    tokenizer: dict | None,
) -> dict:
    """The receipt. `fitted_tokens` is the number of tokens that statistics were taken over, `size` the bytes of the
    weights; `layers` has what was measured in each layer, `tokenizer` what was found of it, None where there is
    none."""
    recipe, mode, checked = plan.recipe, plan.mode, tokens.held_out * tokens.ids.shape[1]

    def parameters(config: MoHGEConfig, field: str) -> dict[str, int]:
        counts = parameter_counts(config)
        per_expert = [layer[field] for layer in layers if layer[field]]
        routed = counts_as_routed(config, per_expert, checked, counts)
        return {
            "total": counts.total,
            "activated": counts.activated,
            "activated_as_routed": routed.activated,
            "flops_per_token": routed.flops,
        }

    report = {
        "mode": mode.name,
        "exact": mode.exact,
        "reason": mode.reason,
        "notes": mode.notes,
        "source": {"path": recipe.source, "revision": plan.revision, "model_type": plan.source.model_type},
        "parameters": {
            "before": parameters(plan.source.equivalent, "tokens_per_expert_before"),
            "after": parameters(plan.target.equivalent, "tokens_per_expert"),
        },
        "bytes_written": size,
        "layers": layers,
        "logits": logits,
        "tokenizer": tokenizer,
        "check": {
            "tokens": checked,
            "text": "calibration" if tokens.text else "random",
        },
        "calibration": {"dataset": recipe.calibration, "tokens": fitted_tokens} if tokens.text else None,
    }
    report["failures"] = judge(report, recipe.max_kl)
    report["passed"] = not report["failures"]
    return report


def judge(report: dict, max_kl: float | None) -> list[str]:
    """What of the promise did not hold; empty if it held."""
    figures = [layer["relative_error"] for layer in report["layers"]] + [report["logits"]["kl"]]
    failures = [] if all(map(math.isfinite, figures)) else ["the model computes values that are not finite"]
    if report["exact"]:
        for layer in report["layers"]:
            if not layer["relative_error"] <= EXACT:
                failures.append(f"layer {layer['layer']}: relative error {layer['relative_error']:.2g} > {EXACT:g}")
        error = report["logits"]["relative_error_median"]
        if not error <= EXACT:
            failures.append(f"logits: median relative error {error:.2g} > {EXACT:g}")
    if max_kl is not None and not report["logits"]["kl"] <= max_kl:
        failures.append(f"logits: KL divergence {report['logits']['kl']:.4g} > --max-kl {max_kl:g}")
    tokenizer = report["tokenizer"]
    if tokenizer is not None and (different := tokenizer["different"]):
        failures.append(
            f"tokenizer: {tokenizer['class']} became {tokenizer['class_after']}, which changes {len(different)} of "
            f"{tokenizer['texts']} texts, such as {different[0]!r}"
        )
    return failures


def _as_routed(report: dict) -> dict[str, str]:
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    if "flops_per_token" not in after:  # once it was not recorded
        return {}
    activated, flops = (f"{before[name]:,} -> {after[name]:,}" for name in ("activated_as_routed", "flops_per_token"))
    text = checked_text(report)
    return {"as routed": f"{activated} on {text}", "FLOPs per token": f"{flops} forward, as routed on it"}


def summary(report: dict) -> str:
    """The receipt as text."""
    logits, before, after = report["logits"], report["parameters"]["before"], report["parameters"]["after"]
    refitted = any("calibration_error" in layer for layer in report["layers"])
    head = "| layer | error | dead experts |" + (" calibration error without refit | with refit |" if refitted else "")
    rows = [head, "|---" * (head.count("|") - 1) + "|"]
    for layer in report["layers"]:
        row = f"| {layer['layer']} | {layer['relative_error']:.2g} | {len(layer['dead_experts'])} |"
        if "calibration_error" in layer:
            row += f" {layer['calibration_error_without_refit']:.4f} | {layer['calibration_error']:.4f} |"
        rows.append(row + " | |" * (refitted and "calibration_error" not in layer))
    facts = {
        "parameters": f"{before['total']:,} -> {after['total']:,}",
        "activated per token": f"{before['activated']:,} -> {after['activated']:,} with equal traffic",
        **_as_routed(report),
        "checked on": checked_text(report),
        "logits, relative error": f"{logits['relative_error_median']:.2g} (median), "
        f"{logits['relative_error_max']:.2g} (largest)",
        "logits, KL divergence": f"{logits['kl']:.4g} nats per token",
        "top-1 agreement": f"{logits['top1_agreement']:.2%}",
    }
    if logits["perplexity_before"] is not None:
        facts["perplexity"] = f"{logits['perplexity_before']:.4g} -> {logits['perplexity_after']:.4g}"
    if report["tokenizer"] is not None:
        facts["tokenizer"] = describe(report["tokenizer"])
    width = max(map(len, facts))
    exact = "exact" if report["exact"] else "not exact"
    return "\n".join(
        [
            f"{report['mode']}, {exact}: {report['reason']}",
            "",
            *rows,
            "",
            *(f"{name:<{width}}  {value}" for name, value in facts.items()),
            *(f"NOTE: {note}" for note in report.get("notes", ())),  # once there were none
            *(f"CHECK FAILED: {failure}" for failure in report["failures"]),
        ]
    )
