"""Recorded routing: what is kept, and what a file of it must be."""

import json
import pickle

import pytest
import torch
from model_cases import make_config, make_model, make_padded_ids

from mohge.training.loop.traffic import RouterTraffic


CONFIG = make_config(mlp_only_layers=[0])  # one layer with experts: 2 + 4 + 6
EXPERTS = 12


def counts(first: int) -> list[torch.Tensor]:
    return [torch.arange(first, first + EXPERTS, dtype=torch.float32)]


def recorded(passes: int = 3, **kwargs) -> RouterTraffic:
    traffic = RouterTraffic(CONFIG, **kwargs)
    for number in range(passes):
        traffic.add(counts(number), tokens=torch.tensor(100 + number))
    return traffic


def test_what_a_model_returns_is_recorded_without_padding():
    model = make_model()
    traffic = RouterTraffic(model.config)
    ids, mask = make_padded_ids(padding=4)
    outputs = model(ids, attention_mask=mask, output_router_logits=True)
    traffic.add(outputs.tokens_per_expert, mask.sum())
    assert traffic.tokens == [2 * 11 - 4]
    for layer, seen in enumerate(outputs.tokens_per_expert):
        assert traffic.layer_counts(layer).tolist() == [seen.tolist()]
        assert traffic.layer_counts(layer).sum() == 3 * (2 * 11 - 4)


def test_the_newest_records_are_kept():
    traffic = recorded(passes=5, limit=2)
    assert traffic.tokens == [103, 104]
    assert traffic.layer_counts(0).tolist() == [list(range(3, 15)), list(range(4, 16))]
    assert traffic.layer_counts(0).dtype == torch.float64


def test_adding_reads_nothing():
    """Reading a tensor on the meta device is an error, as waiting for a GPU would be a loss."""
    traffic = RouterTraffic(CONFIG)
    traffic.add([torch.zeros(EXPERTS, device="meta")], torch.zeros((), device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        _ = traffic.tokens


def test_records_of_other_ranks_are_appended_whatever_the_limit():
    merged = RouterTraffic(CONFIG, limit=2)
    for rank in (recorded(passes=2), recorded(passes=2)):
        merged.extend(pickle.loads(pickle.dumps(rank.records)))
    assert merged.tokens == [100, 101, 100, 101]
    assert merged.layer_counts(0)[2].tolist() == list(range(EXPERTS))


def test_a_file_holds_everything(tmp_path):
    path = tmp_path / "traffic.json"
    path.write_text("an older file")
    traffic = recorded()
    traffic.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = RouterTraffic.load(path)
    assert loaded.records == traffic.records == [(100 + n, [list(range(n, n + EXPERTS))]) for n in range(3)]
    assert loaded.expert_groups == [list(CONFIG.expert_groups)]
    assert loaded.expert_widths == [list(CONFIG.expert_widths)]
    loaded.check(CONFIG)


@pytest.mark.parametrize(
    "other",
    [
        {"moe_intermediate_sizes": [8, 24, 48]},
        {"num_experts_per_group": [3, 3, 6]},
        {"mlp_only_layers": []},
    ],
    ids=["widths", "groups", "layers"],
)
def test_traffic_of_another_config_is_refused(other):
    with pytest.raises(ValueError, match="recorded with other experts"):
        recorded().check(make_config(**{"mlp_only_layers": [0]} | other))


def test_a_model_without_experts_has_no_traffic():
    with pytest.raises(ValueError, match="mlp_only_layers"):
        RouterTraffic(make_config(mlp_only_layers=[0, 1]))


def broken(**changes) -> str:
    good = {
        "expert_groups": [[0, 1]],
        "expert_widths": [[8, 16]],
        "tokens": [5],
        "counts": [[[2, 3]]],
    }
    return json.dumps(good | changes)


def test_the_unbroken_file_loads(tmp_path):
    path = tmp_path / "traffic.json"
    path.write_text(broken())
    assert RouterTraffic.load(path).records == [(5, [[2, 3]])]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "Expecting value"),
        ("[]", "no object"),
        ('{"tokens": [1]}', "no object with expert_groups"),
        (broken(expert_widths=[[8]]), "same lengths"),
        (broken(expert_groups=[]), "same lengths"),
        (broken(expert_groups=[["0", "1"]]), "same lengths"),
        (broken(tokens=[]), "no record"),
        (broken(tokens=[], counts=[]), "no record"),
        (broken(tokens=[-1]), "tokens"),
        (broken(tokens=[5, 5]), "one for each record"),
        (broken(counts=[[[2, -3]]]), "record 0"),
        (broken(counts=[[[2, 3, 4]]]), "record 0"),
        (broken(counts=[[[2, 3], [2, 3]]]), "record 0"),
        (broken(counts=[[[2, 0.5]]]), "record 0"),
        (broken(counts=[[[0, 0]]]), "no token chose"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(content, reason, tmp_path):
    path = tmp_path / "traffic.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason) as caught:
        RouterTraffic.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        RouterTraffic.load(tmp_path / "none.json")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "traffic.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no recorded traffic"):
        RouterTraffic.load(path)
