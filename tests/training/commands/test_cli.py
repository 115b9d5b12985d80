"""The `mohge` command: what it prints and its exit status."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from model_cases import VARIANTS, make_ids, make_model
from report_runs import Page
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohge import MoHGEConfig, MoHGEForCausalLM, record_routing
from mohge.commands import demo
from mohge.commands.main import main
from mohge.info import counts_as_routed, parameter_counts
from mohge.training.data import corpus, packing


def small_config(**overrides):
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "mlp_only_layers": [1],
        "moe_intermediate_sizes": [8, 24],
        "num_experts_per_group": [2, 4],
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 16,
    }
    return MoHGEConfig(**{**values, **overrides})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("router", ["two_level", "top_k", "top_p", "grouped_top_k"])
def test_parameter_counts_are_those_of_the_model(router, tied):
    config = small_config(router_type=router, tie_word_embeddings=tied)
    counts = parameter_counts(config)
    model = MoHGEForCausalLM(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert counts.routed == routed == 2 * 3 * 32 * (2 * 8 + 4 * 24)
    assert counts.embedding == 64 * 32 * (1 if tied else 2)
    dense = counts.total - routed
    one = {width: 3 * 32 * width for width in (8, 24)}
    if router == "grouped_top_k":
        expected = (one[8] + one[24],) * 3
    else:
        mean = (2 * one[8] + 4 * one[24]) / 6
        expected = (one[8] if router == "top_p" else 2 * one[8], 2 * mean, 2 * one[24])
    found = (counts.activated_min, counts.activated, counts.activated_max)
    assert found == pytest.approx([dense + 2 * value for value in expected], abs=2)
    shared_and_dense = 2 * 3 * 32 * 16 + 3 * 32 * 48
    assert counts.activated_ffn == pytest.approx(shared_and_dense + 2 * expected[1], abs=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_as_routed_are_those_of_the_tokens(name):
    """Against the experts that each token chose, one token after the other."""
    model, ids = make_model(**VARIANTS[name]), make_ids(2, 23)
    with torch.no_grad(), record_routing() as routing:
        model(ids)
    tokens_per_expert, used = [], 0
    for layer, routed in zip(model.config.sparse_layers, routing, strict=True):
        tokens_per_expert.append([0] * layer.num_experts)
        for expert in routed.index.flatten().tolist():
            if expert < layer.num_experts:  # or else an empty slot of a top-p set
                tokens_per_expert[-1][expert] += 1
                used += 3 * 32 * layer.expert_widths[expert]
    everywhere = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
    looked_up = 0 if model.config.tie_word_embeddings else 64 * 32
    counts = counts_as_routed(model.config, tokens_per_expert, ids.numel())
    assert counts.activated == round(everywhere + used / ids.numel())
    assert counts.flops == round(2 * (everywhere - looked_up + used / ids.numel()))
    exact = parameter_counts(model.config)
    assert exact.activated_min <= counts.activated <= exact.activated_max


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    commands = ("convert", "demo", "eval", "finetune", "info", "place", "push", "report", "simulate", "train")
    assert all(re.search(rf"^ +{command}\s+\w", printed, re.MULTILINE) for command in (*commands, "serve-check"))


def test_info_on_config_and_folder(tmp_path, capsys):
    config = small_config()
    config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        assert main(["info", str(source)]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"^ +0 +8 +2 +768 +1,536 +14\.3%$", printed, re.MULTILINE)
        assert re.search(r"^ +1 +24 +4 +2,304 +9,216 +85\.7%$", printed, re.MULTILINE)
        assert f"total parameters      {parameter_counts(config).total / 1000:.3f}K" in printed


def test_info_on_the_release(capsys):
    """MoHGE-3B as released: the paper's table (arXiv 2604.23108) has 2.821B parameters; within 2%."""
    assert main(["info", str(Path(__file__).parents[3] / "model_cards" / "mohge-3b")]) == 0
    total = re.search(r"total parameters +([\d.]+)B", capsys.readouterr().out).group(1)
    assert float(total) == pytest.approx(2.821, rel=0.02)


def test_info_with_layers_of_different_groups(tmp_path, capsys):
    layers = {2: {"moe_intermediate_sizes": [8, 16, 24]}, 3: {"moe_intermediate_sizes": [0, 0]}}
    config = small_config(num_experts_per_group=4, num_hidden_layers=4, per_layer_config=layers)
    config.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sparse layer 0: 8 experts" in printed
    assert "sparse layer 1: 12 experts" in printed
    assert len(re.findall(r"^ +[01] +0 +4 +0 +0 +0\.0%$", printed, re.MULTILINE)) == 2  # all experts removed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("not json", "is not JSON"),
        ('{"model_type": "olmoe"}', '`model_type` "olmoe"'),
        ("[1, 2]", "it is no object"),
        ('{"model_type": "mohge", "num_experts_per_tok": 100}', "`num_experts_per_tok`"),
        ('{"model_type": "mohge", "num_experts_per_tok": "six"}', "'num_experts_per_tok'"),
        ('{"model_type": "mohge", "rope_parameters": {"rope_type": "nonsense"}}', "KeyError: 'nonsense'"),
        ('{"model_type": "mohge", "rope_parameters": {"rope_type": "yarn"}}', "factor"),
        ('{"model_type": "mohge", "pad_token_id": 999999}', "Padding_idx"),
        ('{"model_type": "mohge", "per_layer_config": [1]}', "is no valid config"),
        ('{"model_type": "mohge", "dtype": "nonsense"}', "is no valid config"),
    ],
    ids=[
        *("missing", "no json", "other model", "no object", "impossible", "wrong type"),
        *("rope type", "rope factor", "padding token", "list of layers", "dtype"),
    ],
)
def test_info_on_bad_input(content, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert main(["info", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_info_on_folder_without_config(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info"], ["demo", "--router", "x"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: mohge" in capsys.readouterr().err


class _Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]


STEPS = 3
BLOCKS = {"train": STEPS * demo.BATCH, "validation": demo.BATCH + 4}


@pytest.fixture(scope="module")
def _text_is_read_once():
    """Reading the standard library takes longer than the rest of a demo, and so does evaluating all that is held out:
    the demos share the text, and get the beginning of each part."""
    texts, tokenizers, parts = corpus.standard_library_texts(), [], {}

    def train_once(*args):
        if not tokenizers:
            tokenizers.append(corpus.train_tokenizer(*args))
        return tokenizers[0]

    def pack_once(sources, *args):
        split = sources[0].split
        if split not in parts:
            parts[split] = packing.packed_blocks(sources, *args).select(range(BLOCKS[split]))
        return parts[split]

    with pytest.MonkeyPatch.context() as patch:
        for module in (demo, packing):
            patch.setattr(module, "standard_library_texts", lambda: texts)
        patch.setattr(demo, "train_tokenizer", train_once)
        patch.setattr(demo, "packed_blocks", pack_once)
        yield


@pytest.mark.usefixtures("_text_is_read_once")
@pytest.mark.parametrize("router", ["two_level", "top_k", "top_p", "grouped_top_k"])
def test_demo(router, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--router", router, "--steps", str(STEPS), "--output", "out"]) == 0
    printed = capsys.readouterr().out
    (verdict,) = [line for line in printed.splitlines() if line.startswith("Perplexity ")]
    ours, theirs = re.fullmatch(
        r"Perplexity ([\d,.]+) with 16 experts of 64 to 256 neurons \(\w+\) against ([\d,.]+) with 16 experts of 160 "
        r"neurons \(top_[kp]\), both on the first 3,072 held-out tokens .*? 7,58\d,\d+ against 7,583,680 parameters "
        r".*? (?:win|wins|draw) .*",
        verdict,
    ).groups()
    assert max(float(figure.replace(",", "")) for figure in (ours, theirs)) < demo.VOCABULARY
    assert "logits identical" in printed
    assert float(re.search(r"with a cache: logits differ by (\S+)$", printed, re.MULTILINE)[1]) < 1e-4
    rows = re.findall(r"^ +(\d) +(\d+) +4 +([\d,]+) ", printed, re.MULTILINE)
    assert [(group, width) for group, width, _ in rows] == [("0", "64"), ("1", "128"), ("2", "192"), ("3", "256")]
    choices = sum(int(count.replace(",", "")) for _, _, count in rows)
    tokens = BLOCKS["validation"] * demo.BLOCK * 4
    assert choices <= 4 * tokens if router == "top_p" else choices == 4 * tokens

    folder = tmp_path / "out"
    page = _Sources()
    html = (folder / "report.html").read_text(encoding="utf-8")
    page.feed(html)
    assert len(page.sources) > 3
    assert all(source.startswith(("#", "data:image/png;")) for source in page.sources)  # nothing from elsewhere
    written = Page(html)
    text = written.text
    assert verdict in text  # the same figures, once
    assert text.lower().count(f"perplexity {ours}") == printed.lower().count("perplexity") == 1
    for label in ("Prompt, from text that was held out", "How that text goes on", "How the model goes on"):
        assert f"\n{label}:\n" in printed
        assert text.index(verdict) < text.index("By loss") < text.index(label)
    for place in (printed, re.sub("<.*?>", "", html)):
        assert "    if s is None:\n" in place  # as it is in Python's shlex
    assert re.search(r'title="\d+ neurons per layer, loss of the next token [\d.]+ nats"', html)
    for run in (f"mohge demo, {router}", "the control"):  # their curves are in one figure
        assert any(re.fullmatch(rf"{run}: [\d.]+ at {STEPS}", tip) for tip in written.tips)
    assert "\x1b" not in printed
    assert f"| perplexity | {ours.replace(',', '')}" in (folder / "README.md").read_text(encoding="utf-8")

    assert json.loads((folder / "config.json").read_text())["router_type"] == router
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0]) == "import os\n"
    assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.usefixtures("_text_is_read_once")
def test_demo_fails_if_the_cache_is_lost(tmp_path, monkeypatch, capsys):
    forward = MoHGEForCausalLM.forward
    monkeypatch.setattr(
        MoHGEForCausalLM, "forward", lambda self, *args, cache=None, **kwargs: forward(self, *args, **kwargs)
    )
    monkeypatch.setattr(demo, "render", lambda report: "")  # drawing a page takes longer than all else here
    assert main(["demo", "--steps", "1", "--output", str(tmp_path / "out")]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "CHECK FAILED" in line]
    assert any(line.startswith("generated with a cache: ") for line in lines)


def test_demo_refuses_an_existing_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "out" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert main(["demo", "--output", "out"]) == 2
    assert capsys.readouterr().err == "mohge demo: --output out exists: name another folder, or remove it first\n"
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.usefixtures("_text_is_read_once")
def test_interrupted_demo_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        assert list(tmp_path.iterdir())  # it has begun
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train_tokenizer", interrupt)
    assert main(["demo", "--output", "out"]) == 1
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_demo_refuses_zero_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "0"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
