"""The sections of a page that compares runs."""

from .layout import as_perplexity, as_text
from .measure import deciles
from .over_time import compare, compare_training, loss_curves, training_losses
from .sections import Section
from .subject import Report


def comparison(reports: list[Report]) -> list[Section]:
    """Runs beside one another, at most `LINES`: a table, and their curves on the same axes."""
    trained = training_losses({report.source: report.history for report in reports})
    curves = {report.source: loss_curves(report.history) for report in reports}
    held_out = {source: losses["held out"] for source, losses in curves.items() if "held out" in losses}
    exhibits = []
    if trained:
        exhibits.append(compare_training(trained))
    if held_out:
        exhibits.append(
            compare(
                "Held-out loss",
                "Each run's own held-out text, in nats per token. The axis does not begin at 0.",
                "step",
                held_out,
            )
        )
    if all(report.evaluation for report in reports):
        tenths = {
            report.source: [
                (n, part.activated_width)
                for n, part in enumerate(deciles(report.evaluation, report.evaluation.token_loss), start=1)
            ]
            for report in reports
        }
        caption = "Neurons per layer of the tokens of each tenth, by loss. The axis begins at 0."
        exhibits.insert(0, compare("Width against difficulty", caption, "decile of token loss (1 = easiest)", tenths))
    notes = [_best(reports, trained), "Perplexity and loss are per token: they compare models of one tokenizer."]
    return [Section("Verdict", notes, exhibits, _table(reports, trained, held_out))]


def _best(reports: list[Report], trained: dict[str, list]) -> str:
    if all(report.evaluation for report in reports):
        best = min(reports, key=lambda report: report.evaluation.perplexity)
        figures = f"a perplexity of {as_perplexity(best.evaluation.perplexity)} on {best.text}"
    elif len(trained) == len(reports):
        best = min(reports, key=lambda report: trained[report.source][-1][1])
        figures = f"a loss of {trained[best.source][-1][1]:.3f} in training"
    else:
        return "Not all of them have a record of training: give text, to compare them on it."
    activated, when = best.activated()
    return (
        f"{best.source} has the best of the figures below, {figures}, with {best.sizes.total:,} parameters, of which "
        f"a token uses {activated:,.0f} ({when})."
    )


def _table(reports: list[Report], trained: dict[str, list], held_out: dict[str, list]) -> list[list]:
    rows = []
    for report in reports:
        activated, when = report.activated()
        steps = max((entry["step"] for entry in report.history), default=None)
        last = [
            as_text(curve[report.source][-1][1] if report.source in curve else None) for curve in (trained, held_out)
        ]
        measured = report.evaluation
        rows.append(
            [
                *(report.source, report.config.router_type, report.sizes.total, round(activated)),
                *(2 * (round(activated) - report.sizes.looked_up), when, steps, *last),
                as_perplexity(measured.perplexity) if measured else "not measured",
            ]
        )
    names = ["run", "router", "parameters", "used per token", "FLOPs forward per token", "counted", "steps"]
    return [[*names, "last loss in training", "last held-out loss", "perplexity on the text"], *rows]
