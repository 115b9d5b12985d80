"""`mohge finetune` on a small model: all weights, adapters, conversations, merging."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from finetune_cases import arguments, finetune, log, make_workplace, messages, questions, write_rows
from model_cases import MIXTURE
from parallel_training_runs import Ranks
from peft import PeftModel
from pretrain_runs import signal_in
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohge import MoHGEForCausalLM
from mohge.commands.main import main
from mohge.training import MoHGETrainer
from mohge.training.tuning import merge
from mohge.training.tuning.merge import MergeCheck


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("mixture"), **MIXTURE)


@pytest.fixture(scope="module")
def adapter(place):
    """A trained adapter of the experts, as a folder in `place`."""
    assert finetune(place, "trained", lora_rank=2, lora_targets="experts", max_steps=2) == 0
    return "trained"


@pytest.fixture(scope="module")
def chat(place):
    """A run of all weights on the answers, each step on all conversations."""
    assert finetune(place, "answers", "chat.jsonl") == 0
    return place / "answers"


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # TRL tells the Hub about runs, but for those of tests
        yield


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(ids).logits


def base_loss(place, question: str, answer: str) -> tuple[torch.Tensor, int]:
    """Sum of the losses of the answer's tokens under the untrained model, and their number."""
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    before, after = (tokenizer(text)["input_ids"] for text in (f"<user>{question}<assistant>", answer))
    ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
    with torch.no_grad():
        output = MoHGEForCausalLM.from_pretrained(place / "base").eval()(ids).logits[0, len(before) - 1 : -1]
    targets = ids[0, len(before) :]
    return torch.nn.functional.cross_entropy(output, targets, reduction="sum"), len(targets)


def test_all_weights_are_trained_on_text_and_the_run_can_be_loaded(place):
    assert finetune(place, "full", max_steps=8) == 0
    losses = [entry["lm_loss"] for entry in log(place / "full")]
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(place / "full")),
        logits(AutoModelForCausalLM.from_pretrained(place / "base")),
        atol=0.1,
    )
    assert "learning_rate: 0.01" in (place / "full" / "recipe.yaml").read_text()
    AutoTokenizer.from_pretrained(place / "full")


@pytest.mark.parametrize("kind", ["place", "mixture"])
def test_adapters_are_trained_alone_and_merged(kind, request, capsys, recwarn):
    place = request.getfixturevalue(kind)
    assert finetune(place, "lora", lora_rank=4, merge=place / "merged") == 0
    assert not [warning for warning in recwarn if "is_gradient_checkpointing" in str(warning.message)]
    assert "written" in capsys.readouterr().out
    assert log(place / "lora")[-1]["lm_loss"] < log(place / "lora")[0]["lm_loss"]
    base = MoHGEForCausalLM.from_pretrained(place / "base")
    before = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, place / "lora"))
    assert (wanted - before).norm() > 0.05 * before.norm()
    merged = AutoModelForCausalLM.from_pretrained(place / "merged")
    assert isinstance(merged, MoHGEForCausalLM)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    files = {file.name for file in (place / "merged").iterdir()}
    assert {"recipe.yaml", "trainer_state.json", "traffic.json", "tokenizer.json"} <= files
    assert "adapter_config.json" not in files
    adapter, model = ((place / name / "README.md").read_text(encoding="utf-8") for name in ("lora", "merged"))
    assert "(LoRA, rank 4, " in adapter
    assert not [empty for empty in ("More Information Needed", str(place)) if empty in adapter]
    assert "\n# merged\n" in model
    assert "parameters in all" in model


def test_a_run_that_was_stopped_before_its_merge_goes_on_with_it(place, tmp_path):
    flags = {"lora_rank": 2, "max_steps": 2}
    assert finetune(place, "unmerged", merge=tmp_path / "merged", **flags) == 0
    trained = (place / "unmerged" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "merged").rename(tmp_path / "expected")
    assert finetune(place, "unmerged", merge=tmp_path / "merged", **flags) == 0
    assert (place / "unmerged" / "adapter_model.safetensors").read_bytes() == trained
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_trained_adapter_is_merged_on_its_own_and_nothing_loads_before_its_check(
    place, adapter, tmp_path, monkeypatch
):
    load, tried = merge.load_model, []

    def reload(name, **kwargs):
        if "config" in kwargs:
            tried.extend(file.parent for file in tmp_path.rglob("*.safetensors"))
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(name)
        return load(name, **kwargs)

    monkeypatch.setattr(merge, "load_model", reload)
    assert finetune(place, "unused", data=None, model=adapter, merge=tmp_path / "merged") == 0
    base = MoHGEForCausalLM.from_pretrained(place / "base")
    wanted = logits(PeftModel.from_pretrained(base, place / adapter))
    torch.testing.assert_close(logits(MoHGEForCausalLM.from_pretrained(tmp_path / "merged")), wanted)
    assert not (place / "unused").exists()
    assert len(tried) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("kind", ["merge", "quantize"])
def test_a_folder_that_another_command_makes_is_refused(kind, place, adapter, tmp_path, monkeypatch, capsys):
    flags = {"merge": tmp_path / "new" / "out", "model": adapter, "output_dir": tmp_path / "unused"}
    if kind == "quantize":
        flags = {"quantize": "int8", "output_dir": tmp_path / "new" / "out"}
    load, second = MoHGEForCausalLM.from_pretrained, []

    def load_and_start_the_second(*args, **kwargs):
        if not second:
            second.append(None)
            second[0] = finetune(place, "unused", data=None, **flags)
        return load(*args, **kwargs)

    monkeypatch.setattr(MoHGEForCausalLM, "from_pretrained", load_and_start_the_second)
    assert finetune(place, "unused", data=None, **flags) == 0
    assert second == [2]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mohge")]
    assert len(lines) == 1
    assert "another process is writing" in lines[0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_an_adapter_is_read_by_other_commands_as_the_model_that_it_makes(place, adapter, tmp_path, capsys, recwarn):
    assert main(["generate", str(place / adapter), "one", "--max-new-tokens=1"]) == 0
    assert not [str(warning.message) for warning in recwarn if "is_gradient_checkpointing" in str(warning.message)]
    assert finetune(place, "unused", data=None, model=adapter, merge=tmp_path / "merged") == 0
    capsys.readouterr()
    said = {}
    for model in (place / adapter, tmp_path / "merged"):
        assert main(["generate", str(model), "one plus", "--temperature=0", "--max-new-tokens=8"]) == 0
        assert main(["eval", str(model), "--datasets", str(place / "text.txt"), "--sequence-length=32"]) == 0
        said[model] = capsys.readouterr().out.replace(str(model), "MODEL")
    assert len({*said.values()}) == 1, said
    assert not [str(warning.message) for warning in recwarn if "base_model_name_or_path" in str(warning.message)]
    shutil.copytree(place / adapter, tmp_path / "broken")
    save_file({}, tmp_path / "broken" / "adapter_model.safetensors", {"format": "pt"})
    for command in (["generate", str(tmp_path / "broken"), "one"], ["eval", str(tmp_path / "broken"), "--datasets=."]):
        assert main(command) == 2
        assert "adapter_model.safetensors lacks the tensor" in capsys.readouterr().err


def test_a_merge_that_rounds_the_adapter_away_fails_and_leaves_the_adapter(tmp_path, capsys):
    make_workplace(tmp_path, dtype=torch.bfloat16)
    assert finetune(tmp_path, "lora", lora_rank=2, lora_targets="experts", max_steps=2) == 0
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor / 1000 if "lora_B" in name else tensor for name, tensor in state.items()}, weights)
    merge = {"data": None, "model": "lora", "merge": tmp_path / "merged"}
    assert finetune(tmp_path, "unused", **merge) == 1
    assert "CHECK FAILED" in capsys.readouterr().out
    assert not (tmp_path / "merged").exists()
    assert weights.exists()
    assert finetune(tmp_path, "unused", **merge, dtype="float32") == 0
    assert MoHGEForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_check_of_a_merge_refuses_zeros_and_an_adapter_left_out(dtype):
    assert not MergeCheck(error=1.0, effect=3.0, dtype=dtype).passed
    assert not MergeCheck(error=0.003, effect=0.003, dtype=dtype).passed
    assert MergeCheck(error=1e-6, effect=0.0, dtype=dtype).passed


def test_only_the_answers_are_trained_on(place):
    parts = [base_loss(place, *pair) for pair in questions()]
    expected = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    assert finetune(place, "chat", "chat.jsonl", lora_rank=2) == 0
    assert finetune(place, "pairs", "pairs.jsonl", lora_rank=2) == 0
    chat, pairs = log(place / "chat"), log(place / "pairs")
    assert chat[0]["lm_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert chat[0]["loss"] > chat[0]["lm_loss"] + 1e-3  # the router losses
    assert [entry["loss"] for entry in pairs] == [entry["loss"] for entry in chat]


def test_whole_conversations_are_trained_on_when_asked_for(place, chat):
    assert finetune(place, "whole", "chat.jsonl", assistant_only_loss=False, max_steps=1) == 0
    assert log(place / "whole")[0]["lm_loss"] != log(chat)[0]["lm_loss"]


def test_accumulation_does_not_change_the_run_on_conversations(place, chat):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert finetune(place, "in_parts", "chat.jsonl", **sizes) == 0
    for whole, parts in zip(log(chat), log(place / "in_parts"), strict=True):
        for key in ("loss", "lm_loss", "grad_norm", "router/activated_parameters"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4), key


def test_padding_is_not_counted_in_the_router_figures(chat):
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokens = sum(len(tokenizer.apply_chat_template(messages(*pair), return_dict=False)) for pair in questions())
    for entry in log(chat):
        choices = sum(entry[f"router/tokens_group_{group}"] for group in range(3))
        assert choices == tokens * 3  # experts per token


def test_a_model_that_learned_an_answer_gives_it_with_the_saved_template(place):
    question, answer = questions()[0]
    write_rows(place / "one.jsonl", [{"messages": messages(question, answer)}])
    assert finetune(place, "one", "one.jsonl", max_steps=40, lora_rank=8, merge=place / "one-merged") == 0
    tokenizer = AutoTokenizer.from_pretrained(place / "one-merged")
    model = AutoModelForCausalLM.from_pretrained(place / "one-merged")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(output[:-1]) == answer


def finetune_until_step_4(*command: str):
    """`mohge finetune` that is killed in its fourth step."""
    signal_in(MoHGETrainer, "training_step", lambda trainer, *args: trainer.state.global_step == 3, signal.SIGKILL)
    main(list(command))


def test_an_adapter_run_that_is_killed_goes_on_to_the_same_weights(place):
    flags = {"lora_rank": 2, "save_steps": 2, "max_steps": 8, "per_device_train_batch_size": 2}
    assert finetune(place, "whole_run", **flags) == 0
    ranks = Ranks(1, place / "logs", finetune_until_step_4, *arguments(place, "killed", **flags))
    assert ranks.wait() == [-signal.SIGKILL], ranks.errors()
    assert (place / "killed" / "checkpoint-2").exists()
    assert not (place / "killed" / "adapter_model.safetensors").exists()
    assert finetune(place, "killed", **flags) == 0
    once, again = (load_file(place / run / "adapter_model.safetensors") for run in ("whole_run", "killed"))
    assert once.keys() == again.keys()
    for name, weight in once.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0)
    assert [entry["loss"] for entry in log(place / "killed")] == [entry["loss"] for entry in log(place / "whole_run")]


def _without_first(tensors):
    del tensors[min(tensors)]


ADAPTERS = {
    "missing": (_without_first, "lacks the tensor base_model.*lora_A.weight:"),
    "empty": (dict.clear, "lacks the tensor base_model.* and 23 more:"),
    "left over": (lambda tensors: tensors.update(x=torch.zeros(1)), "has no place for the tensor x:"),
    "shape": (lambda tensors: tensors.update({min(tensors): torch.zeros(3, 7)}), "in another shape"),
    "not finite": (lambda tensors: tensors[min(tensors)].fill_(torch.nan), "not finite"),
}


@pytest.mark.parametrize("damage", ADAPTERS)
def test_adapter_whose_tensors_are_not_its_own_is_neither_merged_nor_gone_on_from(
    damage, place, adapter, tmp_path, capsys
):
    change, message = ADAPTERS[damage]
    tensors = load_file(place / adapter / "adapter_model.safetensors")
    change(tensors)
    run = tmp_path / "run"
    shutil.copytree(place / adapter, run / "checkpoint-1")
    save_file(tensors, run / "checkpoint-1" / "adapter_model.safetensors", {"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-1" / name).touch()
    flags = {"lora_rank": 2, "lora_targets": "experts", "output_dir": run}
    for command in ({"data": None, "model": run / "checkpoint-1", "merge": tmp_path / "merged"}, flags):
        capsys.readouterr()
        assert finetune(place, "unused", **command) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mohge")]
        assert re.search(f"adapter_model.safetensors {message}|adapter_model.safetensors has.*{message}", line), line
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"data": None}, "`datasets` is missing"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl does not exist"),
        ({"data": "chat.jsonl", "chat_template": None}, "no chat template"),
        ({"data": "chat.jsonl", "chat_template": "PLACE/plain.jinja"}, "--assistant_only_loss false"),
        ({"data": None, "datasets": "{path: PLACE/chat.jsonl, weight: 1}"}, "`weight` is for text"),
        ({"merge": "PLACE/new"}, "`merge` is for adapters"),
        ({"lora_rank": 4, "merge": "PLACE/base"}, "exists: name another folder"),
        ({"data": None, "merge": "PLACE/new"}, "has no adapter_config.json"),
        ({"lora_rank": 0}, "`lora_rank` is 0"),
        ({"lora_rank": 2**60}, "at most `hidden_size`"),
        ({"learning_rate": "nan"}, "`learning_rate` is nan"),
        ({"lora_targets": "experts"}, "`lora_targets` is for adapters"),
        ({"lora_alpha": 8}, "`lora_alpha` is for adapters"),
        ({"lora_rank": 4, "merge": "PLACE/refused"}, "`merge` and `output_dir` are the same folder"),
        ({"data": "chat.jsonl", "chat_template": "PLACE/broken.jinja"}, "the chat template cannot write"),
        ({"sequence_length": 5000}, "`max_position_embeddings`"),
        ({"lora_rank": 4, "lora_targets": "router"}, "lora_targets"),
        ({"tokenizer": "PLACE/larger"}, "the tokenizer has 400 tokens"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(place, flags, message, capsys):
    (place / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (place / "broken.jinja").write_text("{% for m in messages %}{{ m.content | nonsense }}{% endfor %}")
    larger = AutoTokenizer.from_pretrained(place / "base")
    larger.add_tokens([f"<extra_{i}>" for i in range(400 - len(larger))])
    larger.save_pretrained(place / "larger")
    flags = {
        name: value.replace("PLACE", str(place)) if isinstance(value, str) else value for name, value in flags.items()
    }
    assert finetune(place, "refused", **flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mohge finetune: ")
    assert message in error
    assert not (place / "refused").exists()
    assert not (place / "new").exists()


def test_a_run_without_an_entry_in_its_log_says_its_loss_and_its_adapter_where_its_base_is(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert finetune(Path(), "silent", max_steps=2, logging_steps=500, lora_rank=2) == 0
    assert re.match(r"step 2/2  mean loss \d+\.\d+\n", capsys.readouterr().out)
    adapter = json.loads((place / "silent" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(place / "base")


def test_conversations_that_are_all_too_long_are_refused(place, capsys):
    assert finetune(place, "short", "chat.jsonl", sequence_length=2) == 2
    assert "no conversation has an answer within `sequence_length` (2 tokens)" in capsys.readouterr().err
    assert not list((place / "short").glob("*"))


def test_an_adapter_is_no_model_to_train(place, adapter, capsys):
    assert finetune(place, "refused", model=adapter, lora_rank=2) == 2
    assert "is an adapter: merge it first" in capsys.readouterr().err


def test_conversations_without_trl_say_what_to_install(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "mohge.training.tuning.sft", raising=False)
    assert finetune(place, "refused", "chat.jsonl") == 2
    assert "pip install trl" in capsys.readouterr().err
