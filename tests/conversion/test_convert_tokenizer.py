"""`mohge convert` keeps the tokenizer: AutoTokenizer decides by a model's kind too, and the kind changes."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from backbone_cases import tiny_config
from conversion_cases import COPY, REGROUP, add_tokenizer, assert_refused, convert, make_source, read_report
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohge.commands.main import main
from mohge.model_cards import push


TEXTS = ["Hello world", "  two spaces\tand a tab ", "1 23 456.7", "a\n\n\nb", "Größe 日本語 Привет 🙂", "I'm", " ", ""]
TEXTS += ["<s>x</s> y", "<|im_start|>user\n hi<|im_end|>\n  next"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT = [{"role": "user", "content": " 1 + 2?\n"}]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _byte_level(*before):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre_tokenizers.ByteLevel.alphabet()


def _foreign():
    """Digits stay together, which Qwen2Tokenizer takes apart."""
    return _byte_level(pre_tokenizers.Split(Regex(r"\p{N}+|\p{P}+"), "isolated"))


def _sentence_pieces():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer, [f"<0x{byte:02X}>" for byte in range(256)]


def add_files(folder, make, tokenizer_class, **fields):
    """A tokenizer.json, and a tokenizer_config.json as a repository may have them."""
    tokenizer, alphabet = make()
    tokenizer.add_special_tokens(SPECIAL)
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*SPECIAL, *alphabet])
    tokenizer.train_from_iterator(TEXTS, trainer)
    start = [("<s>", tokenizer.token_to_id("<s>"))]
    if tokenizer.normalizer is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=start)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    if tokenizer_class is not None:
        fields["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


# source, its tokenizer, `tokenizer_class` beside it, the class that transformers takes
CASES = {
    "mistral": ("mistral_sliding_window", _sentence_pieces, "LlamaTokenizer", "TokenizersBackend"),
    "mixtral": ("mixtral", _sentence_pieces, "LlamaTokenizer", "TokenizersBackend"),
    "llama": ("llama", _sentence_pieces, "LlamaTokenizer", "LlamaTokenizer"),
    "llama_bytes": ("llama_biased_llama3_rope", _foreign, "LlamaTokenizerFast", "TokenizersBackend"),
    "qwen2": ("qwen2_mixed_windows_tied", _foreign, "PreTrainedTokenizerFast", "Qwen2Tokenizer"),
    "qwen2_no_class": ("qwen2_mixed_windows_tied", _foreign, None, "Qwen2Tokenizer"),
    "qwen3": ("qwen3_dynamic_rope", _foreign, None, "Qwen2Tokenizer"),
    "qwen2_moe": ("qwen2_moe", _foreign, None, "Qwen2Tokenizer"),
    "olmoe": ("olmoe", _foreign, "GPTNeoXTokenizerFast", "GPTNeoXTokenizer"),
    "olmoe_no_class": ("olmoe", _foreign, None, "GPTNeoXTokenizer"),
}
MIXTURES = ["mixtral", "qwen2_moe", "olmoe", "olmoe_no_class"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each case `source`, `out`, and `back` of a mixture."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for case, (name, make, tokenizer_class, _) in CASES.items():
        source = make_source(name, folder / case / "source", vocab_size=512)
        # LlamaTokenizer reads `legacy`, but does not save it.
        add_files(source, make, tokenizer_class, legacy=case == "llama")
        out = folder / case / "out"
        assert convert(source, out, *(REGROUP if case in MIXTURES else COPY)) == 0
        if case in MIXTURES:
            assert convert(out, folder / case / "back", "--mode", "export") == 0
    return folder


def encoded(tokenizer) -> list:
    ids = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS for special in (True, False)]
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
    return [type(tokenizer).__name__, ids, [tokenizer.decode(row) for row in ids], chat]


@pytest.mark.parametrize(("case", "result"), [*((case, "out") for case in CASES), *((m, "back") for m in MIXTURES)])
def test_same_class_and_ids(case, result, folders):
    source = encoded(AutoTokenizer.from_pretrained(folders / case / "source"))
    assert source[0] == CASES[case][-1]
    assert encoded(AutoTokenizer.from_pretrained(folders / case / result)) == source
    report = read_report(folders / case / result)["tokenizer"]
    assert (report["class"], report["class_after"], report["different"]) == (source[0], source[0], [])
    assert report["texts"] > len(TEXTS)


def test_whoever_saves_a_model_again_keeps_its_tokenizer(folders, tmp_path, monkeypatch):
    """Also what the tokenizer's class does not save."""
    model = folders / "llama" / "out"
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 40))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    common = ["--model", model, "--report_to", "none", "--use_cpu"]
    run = [*common, "--datasets", tmp_path / "text.txt", "--sequence_length", 16, "--max_steps", 1]
    tune = ["--lora_rank", 2, "--merge", tmp_path / "merged", "--chat_template", tmp_path / "chat.jinja"]
    for command in (
        ["train", *run, "--output_dir", tmp_path / "trained"],
        ["finetune", *run, "--output_dir", tmp_path / "tuned", *tune],
        ["finetune", *common, "--quantize", "int8", "--output_dir", tmp_path / "quantized"],
    ):
        assert main([*map(str, command)]) == 0
    monkeypatch.setattr(push, "push_folder", lambda folder, *_, **__: shutil.copytree(folder, tmp_path / "pushed"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged").push_to_hub("someone/model")
    wanted = encoded(AutoTokenizer.from_pretrained(model))
    for name in ("trained", "tuned", "merged", "quantized", "pushed"):
        assert encoded(AutoTokenizer.from_pretrained(tmp_path / name)) == wanted, name


def test_without_the_package(folders, tmp_path):
    """Whether or not the code beside the weights is trusted: it has no part in this."""
    script = tmp_path / "load.py"
    script.write_text(
        "import json, sys\n"
        "sys.modules['mohge'] = None\n"
        "from transformers import AutoTokenizer\n"
        "def encoded(folder, trusted):\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)\n"
        f"    return [type(tokenizer).__name__, [tokenizer(text)['input_ids'] for text in {TEXTS!r}]]\n"
        "print(json.dumps([encoded(folder, trusted) for folder in sys.argv[1:] for trusted in (False, True)]))\n"
    )
    outs = [folders / case / "out" for case in ("mixtral", "llama_bytes", "qwen2", "olmoe")]
    done = subprocess.run([sys.executable, "-I", script, *outs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = iter(json.loads(done.stdout.splitlines()[-1]))
    for out in outs:
        tokenizer = AutoTokenizer.from_pretrained(out)
        wanted = [type(tokenizer).__name__, [tokenizer(text)["input_ids"] for text in TEXTS]]
        assert next(found) == next(found) == wanted


def test_a_tokenizer_that_cannot_stay_fails_the_check(tmp_path, capsys):
    """Beside this kind of model, transformers takes one class whatever the files say."""
    AutoModelForCausalLM.from_config(tiny_config("qwen3_5_moe_text")).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", *REGROUP) == 0
    add_files(tmp_path / "out", _foreign, "TokenizersBackend")
    capsys.readouterr()
    assert convert(tmp_path / "out", tmp_path / "back", "--mode", "export") == 1
    report = read_report(tmp_path / "back")
    assert not report["passed"]
    assert report["tokenizer"]["different"]
    failure = r"CHECK FAILED: tokenizer: TokenizersBackend became Qwen3_5Tokenizer, .* \d+ of \d+ texts"
    assert re.search(failure, capsys.readouterr().out)


def _code(folder):
    add_files(folder, _foreign, "OwnTokenizer", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})


def _old_code(folder):
    add_files(folder, _foreign, None, auto_map=["tokenization_own.OwnTokenizer", None])


def _broken(folder):
    (add_tokenizer(folder) / "tokenizer.json").write_text('{"model": 3}')


def _broken_config(folder):
    (add_tokenizer(folder) / "tokenizer_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_code, r"tokenization_own\.OwnTokenizer.*`auto_map`"),
        (_old_code, r"tokenization_own\.OwnTokenizer.*`auto_map`"),
        (_broken, "tokenizer"),
        (_broken_config, "tokenizer"),
    ],
)
def test_tokenizer_that_is_refused(damage, message, tmp_path, capsys):
    source = make_source("llama", tmp_path / "source")
    damage(source)
    line = assert_refused([source, tmp_path / "out", *COPY], tmp_path, capsys)
    assert re.search(message, line)
    assert "FOLDER/source" in line


def test_tokenizer_that_is_larger_than_the_embedding(tmp_path, capsys):
    source = add_tokenizer(make_source("llama", tmp_path / "source", vocab_size=60))
    size = len(AutoTokenizer.from_pretrained(source))
    assert size > 60
    for arguments in ([*COPY, "--dry-run"], COPY):
        assert convert(source, tmp_path / "out", *arguments) == 0
        assert re.search(rf"^tokenizer .*\b{size}\b.*\b60\b", capsys.readouterr().out, re.MULTILINE)
