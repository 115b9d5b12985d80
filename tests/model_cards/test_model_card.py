"""Model cards: what the records of a folder become, and that nothing else is claimed."""

import json
from xml.etree import ElementTree

import pytest
import torch
import yaml
from conversion_cases import REGROUP, convert, make_source
from huggingface_hub import ModelCard
from model_cases import make_config, make_model

from mohge import MoHGEConfig, MoHGEModel
from mohge.commands.main import main
from mohge.info import parameter_counts
from mohge.model_cards.card import MARKER, draw_widths, keep_card, make_card
from mohge.model_cards.names import is_hub_id
from mohge.model_cards.records import read_record
from mohge.model_cards.staging import is_stale, pushed_files, stage
from mohge.training import RouterStatistics, RouterTraffic


NAME = "someone/model"


def test_folder_without_records_claims_nothing(tmp_path):
    config = make_config()
    card = make_card(tmp_path, NAME, config)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "mohge"],
    }
    counts = parameter_counts(config)
    assert f"{counts.total:,} parameters in all, of which a token passes through {counts.activated:,}" in card.text
    assert "# model\n" in card.text
    sections = {part.partition("\n")[0]: part.partition("\n")[2] for part in card.text.split("\n## ")}
    assert sections["How it was made"].strip().startswith("Not recorded")
    assert sections["Router"].strip() == sections["Evaluation"].strip() == "Not measured."
    assert "how good the model is" in sections["Limits"]
    assert "License: not stated" in sections["Limits"]
    assert "AutoTokenizer" not in card.text


def test_what_was_asked_for_is_in_the_metadata(tmp_path):
    card = make_card(tmp_path, NAME, make_config(), "mit", ["en", "fi"], ["mine"], "org/base")
    data = ModelCard(str(card)).data
    assert (data.license, data.language, data.base_model) == ("mit", ["en", "fi"], "org/base")
    assert data.tags == ["mixture-of-experts", "mohge", "mine"]
    assert "License: `mit`." in card.text


RECIPE = {
    "model": "org/base",
    "datasets": [
        "org/corpus",
        "standard-library",
        "/data/private/own.jsonl",
        {"path": "org/other", "split": "train[:1%]", "weight": 0.5},
        {"path": "texts/more.parquet", "weight": 0.5},
    ],
    "output_dir": "runs/one",
    "tokenizer": "~/tokenizer",
    "hub_token": "hf_secret",
    "learning_rate": 0.001,
}


def test_run_is_described_without_places_and_secrets(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    log = [{"step": 1, "loss": 5.0, "lm_loss": 4.5}, {"step": 9, "loss": 3.0, "lm_loss": 2.25}, {"eval_loss": 2.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1200, "log_history": log}))
    card = make_card(tmp_path, NAME, make_config())
    assert card.data.datasets == ["org/corpus", "org/other"]
    assert card.data.base_model == "org/base"
    recipe = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == {
        "model": "org/base",
        "datasets": [
            "org/corpus",
            "standard-library",
            "own.jsonl",
            {"path": "org/other", "split": "train[:1%]", "weight": 0.5},
            {"path": "more.parquet", "weight": 0.5},
        ],
        "output_dir": "one",
        "tokenizer": "tokenizer",
        "learning_rate": 0.001,
    }
    assert "| optimizer steps | 1,200 |" in card.text
    assert "| last training loss | 2.2500 nats" in card.text
    assert "| last evaluation loss | 2.5000 nats" in card.text
    assert "secret" not in str(card)
    assert "/data" not in str(card)


def test_evaluation_becomes_a_model_index(tmp_path):
    text = {"path": "org/text", "name": "plain", "split": "test", "revision": "abc"}
    local = {"path": "/home/me/held-out.txt", "name": None, "split": "train", "revision": None}
    metrics = {"perplexity": 12.5, "loss": 2.5257, "tokens": 4096}
    task = {"acc,none": 0.25, "acc_stderr,none": 0.01}
    results = [
        {"dataset": text, "metrics": metrics},
        {"dataset": local, "metrics": metrics},
        {"task": "arc_easy", "metrics": task},
    ]
    statistics = RouterStatistics(make_config(), 1000)
    statistics.add([torch.arange(12.0), torch.ones(12)], 26)
    router = {"summary": statistics.summary(), "table": statistics.table()}
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": results, "router": router}))
    card = make_card(tmp_path, NAME, make_config())
    found = ModelCard(str(card)).data.eval_results
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in found] == [
        ("org/text", "perplexity", 12.5),
        ("org/text", "loss", 2.5257),
        ("held-out.txt", "perplexity", 12.5),
        ("held-out.txt", "loss", 2.5257),
        ("arc_easy", "acc", 0.25),
    ]
    assert found[0].dataset_revision == "abc"
    assert "| org/text, plain, test |  | perplexity | 12.5000 |" in card.text
    assert "| org/text, plain, test |  | tokens | 4,096 |" in card.text
    assert "| arc_easy |  | acc_stderr,none | 0.0100 |" in card.text
    assert f"averaged over layers: {statistics.summary()['max_vio']:.2f}\n" in card.text
    assert "On the evaluation text" in card.text
    assert card.text.count("\n| 0 | 8 | 2 |") == 1
    assert "how good the model is" not in card.text
    assert "/home/me" not in str(card)


def test_routing_recorded_in_training(tmp_path):
    model = make_model()
    traffic = RouterTraffic(model.config)
    for seed in range(3):
        ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
        traffic.add(model(ids, output_router_logits=True).tokens_per_expert, tokens=32)
    traffic.save(tmp_path / "traffic.json")
    card = make_card(tmp_path, NAME, model.config)
    totals = [traffic.layer_counts(layer).sum(0) for layer in range(2)]
    dead = sum(int((total == 0).sum()) for total in totals)
    assert "On the last passes of training" in card.text
    assert f"- dead experts: {dead}\n" in card.text
    share = sum(float(total[torch.tensor(model.config.expert_groups) == 2].sum()) for total in totals) / (2 * 3 * 96)
    assert f"\n| 2 | 40 | 6 | {share:.1%} | 50.0% |" in card.text
    with pytest.raises(ValueError, match="other experts"):
        make_card(tmp_path, NAME, make_config(moe_intermediate_sizes=[16, 24, 40]))


def test_both_counts_with_the_name_of_the_text(tmp_path):
    config = make_config(moe_intermediate_sizes=[0, 24, 40], mlp_only_layers=[0])
    counts, tokens = [number % 7 for number in range(12)], 26
    router = {"texts": ["/home/me/held-out.txt", "org/text"], "tokens": tokens, "tokens_per_expert": [counts]}
    statistics = RouterStatistics(config, 1000)
    statistics.add([torch.tensor(counts)], tokens)
    router |= {"summary": statistics.summary(), "table": statistics.table()}
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": [], "router": router}))
    card = make_card(tmp_path, NAME, config).text
    exact = parameter_counts(config)
    used = sum(3 * 32 * width * count for width, count in zip(config.expert_widths, counts, strict=True)) / tokens
    activated = exact.total - exact.routed + used
    assert f"passes through {exact.activated:,} on average if every expert is chosen equally often, " in card
    flops = f"{round(2 * (activated - 64 * 32)):,} FLOPs forward"
    assert f"{round(activated):,} ({flops}) as routed on held-out.txt and org/text, 26 tokens." in card
    assert f"as routed           {activated / 1000:.3f}K  on held-out.txt and org/text, 26 tokens" in card
    assert "/home/me" not in card


def test_layers_of_different_widths_are_a_picture_and_a_table(tmp_path):
    layers = {1: {"moe_intermediate_sizes": [0, 40, 64]}, 2: {"moe_intermediate_sizes": [8, 40, 64]}}
    config = make_config(num_hidden_layers=4, mlp_only_layers=[3], per_layer_config=layers)
    assert "widths.svg" not in make_card(tmp_path, NAME, make_config()).text
    draw_widths(make_config(), tmp_path)
    assert not (tmp_path / "widths.svg").exists()
    make_model(num_hidden_layers=4, mlp_only_layers=[3], per_layer_config=layers).save_pretrained(tmp_path / "model")
    (tmp_path / "staged").mkdir()
    card = stage(tmp_path / "model", tmp_path / "staged", NAME)
    assert "](widths.svg)" in card.text
    assert "\n| 0 | 12 | 8 x 2, 24 x 4, 40 x 6 |\n| 1 | 12 | 0 x 2, 40 x 4, 64 x 6 |\n" in card.text
    assert "widths.svg" in pushed_files(tmp_path / "staged")
    assert is_stale("widths.svg")
    picture = (tmp_path / "staged" / "widths.svg").read_bytes()
    draw_widths(config, tmp_path)
    assert (tmp_path / "widths.svg").read_bytes() == picture  # the same model gives the same bytes
    assert len(picture) < 100_000
    root = ElementTree.fromstring(picture)
    kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not kinds & {"script", "image", "foreignObject", "a"}
    texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"layer", "width", "removed", "8", "24", "40", "64", "0"} <= set(texts)
    assert b"fill: #ffffff" in picture  # a ground of its own, whatever the page's


@pytest.mark.parametrize("name", ["recipe.yaml", "evaluation.json"])
@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_damaged_record_is_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        make_card(tmp_path, NAME, make_config())


def test_card_of_a_conversion(tmp_path):
    source = make_source("olmoe", tmp_path / "private" / "source")
    assert convert(source, tmp_path / "out", *REGROUP) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert MARKER in card.text
    assert "base_model" not in card.data.to_dict()
    assert "Converted by `mohge convert --mode regroup` from `source` (olmoe)" in card.text
    assert "KL divergence" in card.text
    assert "random tokens only" in card.text
    assert str(tmp_path) not in str(card)
    assert str(make_card(tmp_path / "out", "out", MoHGEConfig.from_pretrained(tmp_path / "out"))) == str(card)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    report["source"] |= {"path": "org/olmoe", "revision": "abc"}
    (tmp_path / "out" / "conversion_report.json").write_text(json.dumps(report))
    config = MoHGEConfig.from_pretrained(tmp_path / "out")
    assert make_card(tmp_path / "out", NAME, config).data.base_model == "org/olmoe"
    with pytest.raises(ValueError, match=r"conversion_report.json says of other experts"):
        make_card(tmp_path / "out", NAME, make_config())


def test_card_of_an_export_is_for_the_other_architecture(tmp_path):
    source = make_source("olmoe", tmp_path / "source")
    assert convert(source, tmp_path / "groups", *REGROUP) == 0
    assert convert(tmp_path / "groups", tmp_path / "out", "--mode", "export") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "trust_remote_code" not in card.text
    assert "Router" not in card.text
    assert card.data.tags == ["mixture-of-experts"]
    assert "parameters              " in card.text


def test_card_of_dense_and_of_homogeneous_models(tmp_path):
    dense = make_card(tmp_path, NAME, make_config(mlp_only_layers=[0, 1])).text
    assert "A language model without experts." in dense
    equal = make_card(tmp_path, NAME, make_config(moe_intermediate_sizes=[24, 24, 24], router_type="top_k")).text
    assert "differ in width" not in equal
    assert "HMoE" not in equal


def test_card_of_a_quantised_model_names_what_it_takes(tmp_path):
    config = make_config()
    assert "torchao" not in make_card(tmp_path, NAME, config).text
    config.quantization_config = {"quant_method": "torchao"}
    assert "torchao" in make_card(tmp_path, NAME, config).text


def test_card_of_a_person_gets_what_it_lacks(tmp_path):
    made = make_card(tmp_path, NAME, make_config(), license="mit")
    file = tmp_path / "README.md"
    assert keep_card(file, made) is made
    file.write_text(str(made).replace("# model", "# edited"))
    assert keep_card(file, made) is made
    file.write_text("---\nlicense: apache-2.0\ntags:\n- own\nlanguage: fi\n---\n\n# My own words\n")
    kept = keep_card(file, made)
    assert kept.text == "\n# My own words\n"
    assert kept.data.to_dict() == {
        "license": "apache-2.0",
        "tags": ["own"],
        "language": "fi",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert keep_card(file, made, license="mit").data.license == "mit"
    file.write_text("---\nlicense: apache-2.0\n---\n")
    assert keep_card(file, made).text == made.text
    file.write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="metadata that cannot be read"):
        keep_card(file, made)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("name", False),
        ("standard-library", False),
        ("a/b/c", False),
        ("/a", False),
        ("./a", False),
        ("data/a.jsonl", False),
        ("here/there", False),
        ("", False),
        (None, False),
    ],
)
def test_hub_ids(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    assert is_hub_id(text) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/a b.txt", "a b.txt"),
        ("~/data", "data"),
        ("../x/y", "y"),
        ("some/deep/folder", "folder"),
        ("org/name", "org/name"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("either this/or that", "either this/or that"),
        ("train[:1%]", "train[:1%]"),
    ],
)
def test_paths_in_records(value, expected, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"a": [{"b": value}]}))
    assert read_record(tmp_path, "recipe.yaml") == {"a": [{"b": expected}]}


@pytest.mark.parametrize(
    "flaw", ["no_folder", "empty", "other_model", "bin", "shard", "adapter", "base_model", "name"]
)
def test_folder_that_is_no_model_is_refused(flaw, tmp_path, capsys):
    folder, name = tmp_path / "model", NAME
    if flaw == "empty":
        folder.mkdir()
    elif flaw == "other_model":
        make_source("olmoe", folder)
    elif flaw != "no_folder":
        model = make_model()
        (MoHGEModel(model.config) if flaw == "base_model" else model).save_pretrained(folder, max_shard_size="100KB")
    if flaw == "bin":
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    elif flaw == "shard":
        next(folder.glob("*.safetensors")).unlink()
    elif flaw == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif flaw == "name":
        name = "no/such/name"
    capsys.readouterr()
    assert main(["push", str(folder), name, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    hint = {"bin": ".bin files", "adapter": "merge", "base_model": "MoHGEModel", "shard": "lacks", "name": "no/such"}
    assert hint.get(flaw, "model") in line


def test_results_on_part_of_the_data_are_no_results_of_it(tmp_path):
    metrics = {"perplexity": 12.5, "tokens": 40}
    parts = [{"first_tokens": 40, "sequence_length": 8}, {"limit": 3, "num_fewshot": 1}, {"sequence_length": 8}]
    names = [{"dataset": {"path": "org/text", "split": "test"}}, {"task": "arc_easy"}, {"task": "whole"}]
    results = [{**name, "settings": part, "metrics": metrics} for name, part in zip(names, parts, strict=True)]
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": results}))
    card = make_card(tmp_path, NAME, make_config())
    assert [result.dataset_type for result in ModelCard(str(card)).data.eval_results] == ["whole"]
    assert "| org/text, test | first tokens 40, sequence length 8 | perplexity | 12.5000 |" in card.text
    assert "| arc_easy | limit 3, num fewshot 1 | perplexity | 12.5000 |" in card.text
