"""The model card of a folder: what is known of the model, and what was not measured."""

import math
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mohge import MoHGEConfig
from mohge.info import counts_as_routed, describe, parameter_counts

from .folder import ADAPTER_CONFIG, PICTURE, read_json
from .names import is_hub_id
from .records import read_record, recorded_routings, without_places


TEMPLATE = Path(__file__).with_name("template.md")
MARKER = "<!-- Written by mohge, and written anew at the next push. To keep your changes, remove this line. -->"
PROMPT = "Once upon a time"
"""What the card's example lets the model go on from."""

_ROUTING = {
    "two_level": ("the best groups, then to the best experts of these groups together", "MoHGE", "2604.23108"),
    "top_k": ("the best experts of all groups", "HMoE", "2408.10681"),
    "top_p": ("the best experts of all groups, as many as reach a probability", "HMoE", "2408.10681"),
    "grouped_top_k": ("the same number of experts in each group", "Hi-MoE", "2605.08292"),
    "source": ("experts by the rule of the model it is built on", None, None),
}
"""Router type -> what a token is sent to, the system that has it, and its paper on arXiv."""


def make_card(
    folder: Path,
    name: str,
    config: MoHGEConfig | None,
    license: str | None = None,
    language: list[str] | None = None,
    tags: list[str] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """
    Write the card of a model from what lies in its folder: `recipe.yaml`, `trainer_state.json`, `traffic.json`,
    `conversion_report.json`, `evaluation.json`, tokenizer. What is not recorded there is not claimed.

    Args:
        folder (`Path`): Folder of the model.
        name (`str`): Its name on the Hub, or else where it can be loaded from.
        config ([`MoHGEConfig`], *optional*): Config of the model; `None` for a model of another architecture, which
            `mohge convert --mode export` writes.
        license (`str`, *optional*): The license's id on the Hub.
        language (`list[str]`, *optional*): Languages, as ISO 639 codes.
        tags (`list[str]`, *optional*): Tags beside those of every such model.
        base_model (`str`, *optional*): Hub id of the model that this one was made from; by default from the records.

    Returns:
        `ModelCard`: The card, with [`MARKER`] in its text.

    Raises:
        ValueError: if a record cannot be read, or does not belong to the model.
    """
    names = ("recipe.yaml", "conversion_report.json", "evaluation.json", "trainer_state.json")
    recipe, conversion, evaluation, state = (read_record(folder, name) for name in names)
    if base_model is None:
        base_model = _base_model(recipe, conversion)
    routings = recorded_routings(folder, config) if config else []
    counts = config and parameter_counts(config)
    router = evaluation.get("router") or _recorded_router(folder, config)
    results = _results(evaluation)
    data = ModelCardData(
        base_model=base_model,
        datasets=_datasets(recipe) or None,
        license=license,
        language=language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", *(["mohge"] if config else []), *(tags or [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        title=name.rpartition("/")[2],
        name=name,
        prompt=PROMPT,
        has_tokenizer=has_tokenizer(folder),
        has_chat_template=(folder / "chat_template.jinja").exists(),
        is_mohge=config is not None,
        quantized=getattr(config, "quantization_config", None) is not None,
        versions=f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}",
        config=config,
        widths=sorted({width for layer in config.sparse_layers for width in layer.expert_widths}) if config else None,
        routing=config and _ROUTING[config.router_type],
        counts=counts,
        routed=[
            (routing.text, counts_as_routed(config, routing.tokens_per_expert, routing.tokens, counts))
            for routing in routings
        ],
        shape=config and describe(config, routings),
        picture=PICTURE,
        width_table=config and _width_exhibit(config),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None,
        conversion=conversion,
        receipt=_receipt(conversion),
        training=_training(state),
        router=router,
        evaluation=[
            (_dataset_name(result), _conditions(result), result["metrics"]) for result in evaluation.get("results", [])
        ],
    )


def adapter_card(folder: Path) -> ModelCard:
    """
    The card of an adapter, in place of the empty one that PEFT writes.

    Args:
        folder (`Path`): Folder of the adapter.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    base = without_places(str(config["base_model_name_or_path"]))
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["mohge", "lora"],
    )
    text = f"""
# {folder.resolve().name}

An adapter (LoRA, rank {config["r"]}, and others where `rank_pattern` in `{ADAPTER_CONFIG}` says so) for `{base}`, a
mixture of experts. `mohge finetune --model FOLDER_OF_THIS --merge MERGED` makes a plain model of both, and checks that
it computes the same. Not measured: how good it is at anything.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARKER}\n{text}")


def draw_widths(config: MoHGEConfig, folder: Path):
    """Draw the picture that the card of a model whose layers differ in width refers to."""
    if exhibit := _width_exhibit(config):
        from mohge.training.report.drawing import as_svg

        (folder / PICTURE).write_bytes(as_svg(exhibit))


def _width_exhibit(config: MoHGEConfig):
    if not config.is_heterogeneous:
        return None
    from mohge.training.report.widths import width_exhibit  # a second, which other cards need not wait

    return width_exhibit(config)


def keep_card(file: Path, made: ModelCard, license: str | None = None) -> ModelCard:
    """
    The card to be pushed: `made`, unless a person has written `file`, which a card without [`MARKER`] tells. Then that
    card stays, and gets what it lacks of metadata, and the text if it has metadata alone.

    Args:
        file (`Path`): A README.md, which need not exist.
        made (`ModelCard`): The card of [`make_card`].
        license (`str`, *optional*): License that was asked for; it goes before the one in `file`.

    Raises:
        ValueError: if the metadata of `file` cannot be read.
    """
    if not file.exists():
        return made
    try:
        text = file.read_text(encoding="utf-8")
        if MARKER in text:
            return made
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} has metadata that cannot be read ({error}): mend the lines between ---") from error
    card.text = card.text if card.text.strip() else made.text
    for key in made.data.__dict__:
        if card.data.get(key) is None or (key == "license" and license is not None):
            card.data[key] = made.data[key]
    return card


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in `folder`."""
    return any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))


def _base_model(recipe: dict, conversion: dict) -> str | None:
    source = conversion.get("source", {})
    if source.get("revision"):  # only sources from the Hub have one
        return source["path"]
    return recipe["model"] if is_hub_id(recipe.get("model")) else None


def _datasets(recipe: dict) -> list[str]:
    """Hub ids of the data sets that a run was trained on."""
    entries = recipe.get("datasets") or []
    paths = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    return sorted({path for path in paths if is_hub_id(path)})


def _dataset_name(result: dict) -> str:
    if "task" in result:
        return result["task"]
    dataset = result["dataset"]
    return ", ".join(str(dataset[key]) for key in ("path", "name", "split") if dataset.get(key)).replace("|", "/")


def _conditions(result: dict) -> str:
    """What it was measured under, such as "sequence length 256"."""
    settings = result.get("settings", {}).items()
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings if value is not None)


def _results(evaluation: dict) -> list[EvalResult]:
    """Evaluation results as the Hub shows them: those of all data, since it shows no conditions."""
    found = []
    for result in evaluation.get("results", []):
        if any(result.get("settings", {}).get(name) is not None for name in ("limit", "first_tokens")):
            continue
        dataset = result.get("dataset", {"path": result.get("task")})
        for metric, value in result["metrics"].items():
            kind = metric.partition(",")[0]  # the harness adds the name of its filter
            if kind == "tokens" or "stderr" in kind or not math.isfinite(value):
                continue
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset["path"],
                    dataset_name=_dataset_name(result),
                    dataset_config=dataset.get("name"),
                    dataset_split=dataset.get("split"),
                    dataset_revision=dataset.get("revision"),
                    metric_type=kind,
                    metric_value=value,
                )
            )
    return found


def _receipt(conversion: dict) -> str | None:
    if not conversion:
        return None
    from mohge.conversion.receipt import summary  # which imports this module

    return summary(conversion)


def _recorded_router(folder: Path, config: MoHGEConfig | None) -> dict | None:
    """Figures of the routing that a training run recorded last."""
    if config is None or not (folder / "traffic.json").exists():
        return None
    from mohge.training import RouterStatistics, RouterTraffic

    traffic = RouterTraffic.load(folder / "traffic.json")
    traffic.check(config)
    statistics = RouterStatistics(config, parameter_counts(config).total - config.routed_parameters)
    layers = range(len(config.sparse_layers))
    statistics.add([traffic.layer_counts(layer).sum(0).float() for layer in layers], sum(traffic.tokens))
    return {"summary": statistics.summary(), "table": statistics.table(), "training": True}


def _training(state: dict) -> dict[str, str]:
    """What a run's log says of the training itself."""
    if not state:
        return {}
    history = state["log_history"]
    last = {key: entry[key] for entry in history for key in ("lm_loss", "eval_loss", "train_runtime") if key in entry}
    facts = {"optimizer steps": f"{state['global_step']:,}"}
    if state.get("num_input_tokens_seen"):
        facts["tokens"] = f"{state['num_input_tokens_seen']:,}"
    if "lm_loss" in last:
        facts["last training loss"] = f"{last['lm_loss']:.4f} nats per token, router losses left out"
    if "eval_loss" in last:
        facts["last evaluation loss"] = f"{last['eval_loss']:.4f} nats per token"
    if "train_runtime" in last:
        facts["wall time"] = f"{last['train_runtime']:,.0f} s"
    return facts
