"""`mohge finetune --distill`: another model's logits as targets."""

import pytest
import torch
from finetune_cases import finetune, log, make_workplace
from model_cases import make_ids, make_model
from transformers import LlamaConfig, LlamaForCausalLM

from mohge import MoHGEForCausalLM
from mohge.training.report.over_time import loss_exhibit
from mohge.training.tuning.distillation import DistillationLoss


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`base`, and `student`, which is `base` with noise on its experts."""
    place = make_workplace(tmp_path_factory.mktemp("distill"))
    model = MoHGEForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.save_pretrained(place / "student")
    for file in (place / "base").glob("tokenizer*"):
        (place / "student" / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize("items", [None, 40])
def test_the_loss_is_the_divergence_from_the_teacher(items):
    student, teacher = make_model(), make_model(router_type="top_k")
    ids, mask = make_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    labels = ids.clone()
    labels[0, :4] = -100
    loss_function = DistillationLoss(teacher, student)
    outputs = student.train()(input_ids=ids, attention_mask=mask)
    loss = loss_function(outputs, labels, num_items_in_batch=items)
    q, p = outputs.logits.log_softmax(-1), teacher(ids).logits.log_softmax(-1)
    total = count = 0
    for row, column in (labels[:, 1:] != -100).nonzero().tolist():
        total += (p[row, column].exp() * (p[row, column] - q[row, column])).sum()
        count += 1
    torch.testing.assert_close(loss, total / (items or count))
    assert loss > 1e-3
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.get_output_embeddings().weight.grad.any()
    outputs = student.eval()(input_ids=ids)
    torch.testing.assert_close(loss_function(outputs, labels), student(ids, labels=labels).lm_loss)


@pytest.mark.parametrize(
    ("data", "flags"),
    [("text.txt", {}), ("chat.jsonl", {}), ("text.txt", {"lora_rank": 2}), ("pairs.jsonl", {"lora_rank": 2})],
    ids=["text", "conversations", "adapters", "adapters on completions"],
)
def test_a_student_comes_nearer(data, flags, place, tmp_path, recwarn, capsys):
    flags = {"distill": place / "base", "max_steps": 10, "learning_rate": 5e-3, **flags}
    assert finetune(place, tmp_path / "run", data, "student", **flags) == 0
    assert not [str(warning.message) for warning in recwarn if "compute_loss_func" in str(warning.message)]
    divergence = [entry["objective"] for entry in log(tmp_path / "run")]
    assert 0.01 < divergence[0] < 5
    assert divergence[-1] < 0.9 * divergence[0]
    printed = capsys.readouterr().out
    assert f"loss {divergence[0]:.4g}  " in printed
    assert "perplexity" not in printed  # of a divergence there is none
    assert "perplexity" not in loss_exhibit(log(tmp_path / "run")).finding
    assert all("router/load_balancing" in entry or "aux_loss" not in entry for entry in log(tmp_path / "run"))


def test_its_own_teacher_has_nothing_to_teach(place, tmp_path):
    assert finetune(place, tmp_path / "run", model="base", distill=place / "base", max_steps=1) == 0
    assert abs(log(tmp_path / "run")[0]["objective"]) < 1e-5


def test_teachers_that_will_not_do(place, tmp_path, capsys):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=299, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "other")
    assert finetune(place, tmp_path / "run", model="base", distill=tmp_path / "other") == 2
    assert "`distill` has 299 tokens and the model 300" in capsys.readouterr().err.splitlines()[-1]
    assert finetune(place, tmp_path / "run", model="base", distill=tmp_path / "nothing") == 2
    assert "nothing" in capsys.readouterr().err.splitlines()[-1]
