"""Four ranks compute what one process does, in every layout of data, tensor and expert parallelism."""

import pytest
from parallel_cases import LAYOUTS_OF_4
from parallel_checks import (
    Launch,
    check_checkpoint,
    check_gradients,
    check_logits,
    check_nothing_is_held_twice,
    check_own_experts,
    check_statistics,
    names,
)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return Launch(4, tmp_path_factory.mktemp("four_ranks"))


@pytest.mark.parametrize("name", [*names(4), *names(4, "adapted")])
def test_logits_are_those_of_one_process(name, launch):
    check_logits(launch, name)


@pytest.mark.parametrize("name", names(4))
def test_gradients_are_those_of_one_process(name, launch):
    check_gradients(launch, name)


@pytest.mark.parametrize("name", names(4))
def test_losses_and_counts_are_those_of_one_process(name, launch):
    check_statistics(launch, name)


@pytest.mark.parametrize("name", [name for name in names(4) if name.endswith("one set only")])
def test_ranks_of_other_sets_have_no_token(name, launch):
    config = launch.config(name)
    *others, last = launch.one_process(name)["tokens_per_expert"][0].chunk(config.num_expert_sets)
    assert [int(counts.sum()) for counts in others] == [0, 0, 0]
    assert last.sum() == 8 * 9 * config.num_experts_per_tok


@pytest.mark.parametrize("layout", LAYOUTS_OF_4)
def test_rank_holds_its_range_of_experts(layout, launch):
    check_own_experts(launch, f"{layout}, two_level")


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS_OF_4.items() if "tp_size" not in layout])
def test_no_parameter_is_held_twice(layout, launch):
    check_nothing_is_held_twice(launch, f"{layout}, two_level")


@pytest.mark.parametrize("name", names(4, "save"))
def test_saved_checkpoint_is_the_source_bit_by_bit(name, launch):
    check_checkpoint(launch, name)
