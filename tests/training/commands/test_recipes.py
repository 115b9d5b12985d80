"""The shipped recipes: configs against the papers' figures, cards, arguments, and a scaled-down run of each."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from mohge import MoHGEConfig
from mohge.commands.main import main
from mohge.commands.recipe import parse_recipe
from mohge.commands.train import PretrainArguments
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.info import parameter_counts
from mohge.model_cards.names import shipped_file, shipped_recipes
from mohge.model_cards.shipped import load_config
from mohge.training.data.corpus import STANDARD_LIBRARY, standard_library_texts, train_tokenizer
from mohge.training.data.sources import TextSource, parse_sources


RECIPES = ["hi-moe-7b", "hmoe-3b", "modse", "moe-3b", "mohge-3b", "olmoe-1b-7b", "tiny", "tiny-moe"]
TRAINED_HERE = {"tiny", "tiny-moe"}
DEVICES = 8  # which the recipes' comments on the batch are for


def config_values(recipe: str, **overrides) -> dict:
    """The recipe's config, with other fields of its own or of its backbone."""
    values = json.loads(shipped_file(recipe, "config.json").read_text())
    for name, value in overrides.items():
        (values["backbone_config"] if name in values["backbone_config"] else values)[name] = value
    return values


def counts_of(recipe: str, **overrides):
    return parameter_counts(MoHGEConfig.from_dict(config_values(recipe, **overrides)))


def arguments_of(recipe: str) -> tuple[PretrainArguments, TrainingArguments]:
    arguments = [recipe, "--use_cpu", "true", "--bf16", "false"]
    (own, training), _ = parse_recipe("mohge train", "", [PretrainArguments, TrainingArguments], arguments)
    return own, training


def sources_of(recipe: str) -> list[TextSource]:
    own, _ = arguments_of(recipe)
    return parse_sources(own.datasets, "datasets") + parse_sources(own.eval_datasets, "eval_datasets")


def card_of(recipe: str) -> ModelCard:
    return ModelCard.load(shipped_file(recipe, "README.md"))


def test_recipes_shipped():
    assert shipped_recipes() == RECIPES


# Configs.


@pytest.mark.parametrize(
    ("recipe", "total"),
    [
        ("mohge-3b", 2.821e9),  # 2604.23108, table 1
        ("moe-3b", 3.3614e9),  # 2604.23108, table 1
        ("olmoe-1b-7b", 6.9e9),  # 2409.02060
        ("hi-moe-7b", 6.9e9),  # 2605.08292: the size of OLMoE
    ],
)
def test_total_parameters_are_the_papers(recipe, total):
    assert counts_of(recipe).total == pytest.approx(total, rel=0.02)


def test_activated_parameters_of_moe_3b_are_the_papers():
    """0.376B (2604.23108, table 1), which is the feed-forward part."""
    assert counts_of("moe-3b").activated_ffn == pytest.approx(0.376e9, rel=0.02)


def test_activated_parameters_of_mohge_3b_are_within_reach():
    """0.295B (2604.23108, table 1), measured after training; which experts are chosen is up to the router."""
    counts = counts_of("mohge-3b")
    other = counts.activated - counts.activated_ffn
    assert counts.activated_min - other < 0.295e9 < counts.activated_ffn


def test_activated_parameters_of_olmoe_are_the_papers():
    for recipe in ("olmoe-1b-7b", "hi-moe-7b"):
        assert counts_of(recipe).activated == pytest.approx(1.3e9, rel=0.02)  # 2409.02060


def test_hmoe_3b_has_the_depth_of_the_papers_activated_parameters():
    """2408.10681, table 1: 0.77B for two of eight equal experts, and 1.32B for the dense model of appendix A."""
    equal = {"router_type": "top_k", "router_entropy_coef": 0.0}
    two_of_eight = {"moe_intermediate_sizes": [4096], "num_experts_per_group": 8, "num_experts_per_tok": 2}
    assert counts_of("hmoe-3b", **equal, **two_of_eight).activated == pytest.approx(0.77e9, rel=0.01)
    dense = {"moe_intermediate_sizes": [32768], "num_experts_per_group": 1, "num_experts_per_tok": 1}
    assert counts_of("hmoe-3b", **equal, **dense, num_hidden_layers=12).total == pytest.approx(1.32e9, rel=0.01)


def test_hmoe_3b_has_the_arithmetic_widths():
    """2408.10681, section 3.1 and appendix A: {9, 11, ..., 23} of 32768."""
    widths = config_values("hmoe-3b")["moe_intermediate_sizes"]
    assert sum(widths) == 32768
    assert [width / widths[0] for width in widths] == [n / 9 for n in range(9, 24, 2)]


def test_modse_has_pairs_of_one_sum_and_the_papers_size():
    """2409.12210: pairs of experts share what two equal experts of 2.5 times the hidden size have; 700M for one."""
    config = load_config("modse")
    widths = sorted(config.expert_widths)
    baseline = 5 * config.hidden_size // 2
    assert {small + large for small, large in zip(widths, reversed(widths), strict=True)} == {2 * baseline}
    single = {"moe_intermediate_sizes": [baseline], "num_experts_per_group": 1, "num_experts_per_tok": 1}
    assert counts_of("modse", **single).total == pytest.approx(700e6, rel=0.02)


@pytest.mark.parametrize(("recipe", "baseline"), [("tiny", "tiny-moe"), ("hi-moe-7b", "olmoe-1b-7b")])
def test_baseline_has_the_same_size(recipe, baseline):
    assert counts_of(baseline).total == pytest.approx(counts_of(recipe).total, rel=0.02)
    assert counts_of(baseline).activated == pytest.approx(counts_of(recipe).activated, rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
def test_info_takes_the_name_of_a_recipe(recipe, capsys):
    assert main(["info", recipe]) == 0
    number, unit = re.search(r"^total parameters +([\d.]+)([BM])", capsys.readouterr().out, re.MULTILINE).groups()
    assert float(number) * {"B": 1e9, "M": 1e6}[unit] == pytest.approx(counts_of(recipe).total, rel=1e-3)


# Cards.


@pytest.mark.parametrize("recipe", RECIPES)
def test_card_has_metadata(recipe):
    data = card_of(recipe).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"mohge", "mixture-of-experts"} <= set(data.tags)
    trained_on = {source.path for source in parse_sources(arguments_of(recipe)[0].datasets, "datasets")}
    assert set(data.datasets or []) == trained_on - {STANDARD_LIBRARY}


@pytest.mark.parametrize("recipe", RECIPES)
def test_card_states_the_parameter_counts(recipe):
    counts = counts_of(recipe)
    rows = re.findall(r"^\| (total|activated|activated, FFN) \| ([\d,]+) \|", card_of(recipe).text, re.MULTILINE)
    assert {name: int(number.replace(",", "")) for name, number in rows} == {
        "total": counts.total,
        "activated": counts.activated,
        "activated, FFN": counts.activated_ffn,
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_card_says_whether_its_model_was_trained(recipe):
    assert ("Not trained here" in card_of(recipe).text) == (recipe not in TRAINED_HERE)


def test_documentation_lists_every_recipe():
    root = Path(__file__).parents[3]
    documentation = (root / "README.md").read_text() + (root / "training" / "README.md").read_text()
    for recipe in RECIPES:
        assert re.search(rf"^\|.*`{recipe}`", documentation, re.MULTILINE), recipe


# Arguments.


def test_a_short_run_is_not_silent():
    (_, training), given = parse_recipe("mohge train", "", [PretrainArguments, TrainingArguments], ["--model=x"])
    assert training.logging_steps == 10
    assert "logging_steps" not in given


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_what_the_command_parses(recipe):
    own, training = arguments_of(recipe)
    assert own.model == recipe
    assert Path(training.output_dir).name == (f"mohge-{recipe}" if recipe in TRAINED_HERE else recipe)
    assert own.sequence_length <= load_config(recipe).max_position_embeddings
    for source in sources_of(recipe):
        assert source.path == STANDARD_LIBRARY or re.fullmatch(r"[\w.-]+/[\w.-]+", source.path)


@pytest.mark.parametrize(
    ("recipe", "tokens"),
    [
        ("mohge-3b", 1_066_793_903_690),  # the release's TOTAL_TOKENS
        ("moe-3b", 1_066_793_903_690),
        ("hmoe-3b", 2.6e20 / 6 / 0.68e9),  # 2408.10681, table 1
        ("hi-moe-7b", 58e9),  # 2605.08292, abstract
        ("olmoe-1b-7b", 5e12),  # the release's t_max
        ("modse", 100e9),  # 2409.12210
    ],
)
def test_steps_make_the_papers_tokens(recipe, tokens):
    own, training = arguments_of(recipe)
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps * DEVICES
    assert training.max_steps * sequences * own.sequence_length == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in TRAINED_HERE])
def test_comment_on_the_batch_is_right(recipe):
    own, training = arguments_of(recipe)
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps * DEVICES
    comment = shipped_file(recipe, "recipe.yaml").read_text()
    assert f"A step is {sequences:,} sequences, {sequences * own.sequence_length:,} tokens" in comment
    assert f"accumulate {training.gradient_accumulation_steps * DEVICES} / N" in comment.replace("\n# ", " ")
    assert f"{training.max_steps:,} steps" in comment


# Runs.


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[Path, Path]:
    """Some of the standard library's text, and a tokenizer for it."""
    folder = tmp_path_factory.mktemp("text")
    documents = [document[:4000] for document in standard_library_texts(400_000)[0]]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    train_tokenizer(documents, 512).save_pretrained(folder / "tokenizer")
    return folder / "text.jsonl", folder / "tokenizer"


def scaled_down(recipe: str) -> dict:
    """The config with the recipe's routing, groups, experts and losses, and small everything else."""
    values = config_values(recipe)
    largest = max(values["moe_intermediate_sizes"])
    backbone = {
        **values["backbone_config"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        "vocab_size": 512,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    if "head_dim" in backbone:
        backbone["head_dim"] = 12
    if "kv_lora_rank" in backbone:
        backbone |= {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 12, "v_head_dim": 12}
    return {
        **values,
        "backbone_config": backbone,
        "moe_intermediate_sizes": [max(4, width * 48 // largest) for width in values["moe_intermediate_sizes"]],
        "shared_expert_intermediate_size": min(48, values["shared_expert_intermediate_size"]),
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_scaled_down_recipe_trains(recipe, text, tmp_path):
    file, tokenizer = text
    own, training = arguments_of(recipe)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(scaled_down(recipe)))
    steps, run = 10, tmp_path / "run"
    warmup = training.warmup_steps if training.warmup_steps < 1 else training.warmup_steps / training.max_steps
    options = {
        "model": config,
        "datasets": file,
        "eval_datasets": file,
        "sequence_length": 64,
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": warmup,
        "bf16": "false",
        "logging_steps": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "output_dir": run,
    }
    if own.tokenizer is not None:
        options["tokenizer"] = tokenizer
    assert main(["train", recipe, *[f"--{name}={value}" for name, value in options.items()]]) == 0

    logs = [
        entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "lm_loss" in entry
    ]
    losses = [entry["lm_loss"] for entry in logs]
    assert len(losses) == steps // 2
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]
    assert all(entry["learning_rate"] <= 1e-2 for entry in logs)
    if training.lr_scheduler_type != "constant_with_warmup":
        assert all(after["learning_rate"] < before["learning_rate"] for before, after in pairwise(logs[1:]))
    values = load_config(recipe)
    for name, field in ROUTER_COEFFICIENTS.items():
        assert (f"router/{name}" in logs[-1]) == (getattr(values, field) > 0)
