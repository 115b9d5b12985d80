"""The sections of the page: figures, tables, and a sentence where there is nothing to draw."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..loop.metrics import RouterStatistics
from . import over_time, routing
from .drawing import Exhibit, evenly
from .layout import group_labels
from .measure import top_tokens
from .sample import Piece, passages
from .subject import Report, span
from .verdict import verdict


_WIDTHS = 16
"""Widths at most whose top tokens are listed."""


class Section(NamedTuple):
    """A section of the page."""

    title: str
    notes: list[str] = []
    exhibits: list[Exhibit] = []
    table: list[list] | None = None
    """Column names, then rows."""
    tokens: list[tuple[str, str, list[tuple[str, int, float]]]] | None = None
    """Of each width its name, its share, and its tokens: text, number of occurrences, factor."""
    sample: dict[str, list[Piece]] | None = None
    """Passages by what they are."""


def sections(report: Report) -> list[Section]:
    """The sections in order."""
    said, everything = verdict(report), []
    if said:
        everything.append(Section("Verdict", said))
    if report.evaluation is not None:
        everything.append(_difficulty(report))
    if report.sample is not None:
        note = (
            "The stronger a token's ground, the more neurons it used to predict the next one; how hard that was shows "
            "where the pointer rests."
        )
        everything.append(Section("Sample", [note], sample=passages(report.sample, report.tokenizer)))
    everything += [*_training(report), *_routing(report)]
    if report.evaluation is not None:
        everything.append(_tokens(report))
    return everything


def _training(report: Report) -> list[Section]:
    history, config = report.history, report.config
    if not history:
        return [
            Section("Training", ["There is no training record here: in a run's folder, trainer_state.json holds it."])
        ]
    loss, optimizer = over_time.loss_exhibit(history), over_time.optimizer_exhibit(history)
    both = over_time.training_losses({each.source: each.history for each in (report, report.control) if each})
    compared = over_time.compare_training(both) if len(both) > 1 else None
    first = Section(
        "Training",
        [] if loss else ["The run has logged no loss yet."],
        [each for each in (loss, compared, optimizer) if each],
    )
    measured = None if report.evaluation is None else report.evaluation.statistics.activated_parameters()
    router = over_time.router_exhibit(history, config, report.sizes.activated, measured)
    groups = over_time.group_exhibit(history, config)
    experts = over_time.expert_exhibit(history, config)
    notes = []
    if router is None:
        notes.append("The run logged no router figures: MoHGETrainer logs them where a router loss is switched on.")
    elif experts is None:
        notes.append("The run logged no loads of single experts.")
    if len(group_labels(config)) == 1:
        notes.append("The model has one group, which gets every choice.")
    return [first, Section("Routing during training", notes, [each for each in (groups, experts, router) if each])]


def _routing(report: Report) -> list[Section]:
    statistics, where = report.newest_routing
    if statistics is None:
        return [Section("Routing", ["To see where tokens go, and which tokens, give text: --text FILE."])]
    exhibits = [routing.load_exhibit(statistics, report.config)]
    if statistics.num_groups > 1:
        exhibits.append(routing.group_exhibit(statistics, report.config))
    exhibits.append(routing.layer_exhibit(statistics, report.config))
    notes = [
        f"Measured {where}. MaxVio is the load of the busiest expert over the mean, minus 1; dead experts get no "
        "token; a group's share if even is what it would get if all experts were equally loaded."
    ]
    if report.evaluation is None:
        notes.append(
            "To see perplexity, width against difficulty, and the tokens of each width, give text: --text FILE."
        )
    return [Section("Routing", notes, exhibits, _router_table(statistics))]


def _router_table(statistics: RouterStatistics) -> list[list]:
    rows = [
        [
            *(row["group"], span(row["widths"]), span(row["experts"]), row["choices"]),
            *(f"{row['share']:.1%}", f"{row['even_share']:.1%}", f"{row['max_vio']:.2f}", row["dead_experts"]),
        ]
        for row in statistics.table()
    ]
    return [["group", "width", "experts", "choices", "share", "if even", "MaxVio", "dead"], *rows]


def _difficulty(report: Report) -> Section:
    evaluation = report.evaluation
    frequency = evaluation.token_ids.bincount()[evaluation.token_ids].float()
    by_loss = routing.difficulty_exhibit(
        evaluation,
        report.config,
        evaluation.token_loss,
        ("loss", "easiest", "hardest"),
        "Tokens in the order of the loss of the prediction that was made at them, in ten parts.",
    )
    by_frequency = routing.difficulty_exhibit(
        evaluation,
        report.config,
        frequency,
        ("frequency", "rarest", "most frequent"),
        "Tokens in the order of how often they occur in the text, in ten parts.",
    )
    return Section("Width against difficulty", exhibits=[by_loss, by_frequency])


def _tokens(report: Report) -> Section:
    evaluation = report.evaluation
    if len(evaluation.widths) > 1:
        unit, labels, choices = "width", [f"width {width}" for width in evaluation.widths], evaluation.width_choices
    else:
        unit, choices = "group", evaluation.group_choices
        labels = [f"group {group}" for group in range(choices.shape[1])]
    title = f"Top tokens per {unit}"
    if len(labels) == 1:
        return Section(title, ["All experts are of one width and one group: every token chooses the same."])
    minimum = max(3, len(evaluation.token_ids) // 5000)
    shown = evenly([*zip(labels, top_tokens(evaluation.token_ids, choices, minimum), strict=True)], _WIDTHS)
    some = "" if len(shown) == len(labels) else f" {len(shown)} of {len(labels)} {unit}s are shown."
    note = (
        f"The tokens that choose each {unit} most above the average token, as in Table 3 of HMoE (arXiv 2408.10681): "
        f"by the {unit}'s share of the token's choices over its share of all choices. The last number is how often "
        f"the token occurs; tokens with fewer than {minimum} occurrences are left out.{some}"
    )
    tokens = [
        (
            label,
            f"{top.share:.1%} of all choices",
            [(readable(report.tokenizer, token), count, lift) for token, count, lift in top.tokens],
        )
        for label, top in shown
    ]
    return Section(title, [note], tokens=tokens)


def readable(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token with its white space made visible, and pieces of a character as the tokenizer has them."""
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:
        return str(tokenizer.convert_ids_to_tokens(token))
    visible = {" ": "\u2423", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "".join(visible.get(character, character) for character in text)
