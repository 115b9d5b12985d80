"""Which device holds which experts."""

import random
from fractions import Fraction

import pytest
import torch
from model_cases import make_config

from mohge.training.placement.allocations import (
    ALLOCATIONS,
    all_size,
    contiguous,
    fitting_devices,
    misfit,
    packed,
    paired,
)


UNEQUAL = {"moe_intermediate_sizes": [8, 24, 40], "num_experts_per_group": [4, 8, 12]}  # four sets
ONE_GROUP = {"moe_intermediate_sizes": [16], "num_experts_per_group": 8, "num_experts_per_tok": 2}


def one_of_each(widths: list[int]):
    return make_config(moe_intermediate_sizes=widths, num_experts_per_group=1, router_type="top_k")


def widths_held(config, allocation) -> list[list[int]]:
    return [[config.expert_widths[expert] for expert in held] for held in allocation.devices]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_all_size_gives_each_device_the_same_part_of_every_group(devices):
    config = make_config(**UNEQUAL)
    for device, held in enumerate(all_size(config, devices).devices):
        places = {(config.expert_groups[expert], config.expert_slots[expert]) for expert in held}
        expected = set()
        for group, count in enumerate([4, 8, 12]):
            expected |= {(group, i) for i in range(device * count // devices, (device + 1) * count // devices)}
        assert places == expected
        assert held == tuple(range(device * 24 // devices, (device + 1) * 24 // devices))


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 12, 24])
def test_contiguous_cuts_the_experts_in_the_order_of_their_widths(devices):
    config = make_config(**UNEQUAL)
    order = sorted([8] * 4 + [24] * 8 + [40] * 12)
    size = 24 // devices
    expected = [order[device * size : (device + 1) * size] for device in range(devices)]
    assert [sorted(held) for held in widths_held(config, contiguous(config, devices))] == expected


@pytest.mark.parametrize(("devices", "each"), [(1, 36), (2, 18), (4, 9)])
def test_paired_experts_have_a_constant_sum(devices, each):
    config = one_of_each([1, 2, 3, 4, 5, 6, 7, 8])
    held = widths_held(config, paired(config, devices))
    assert [sum(widths) for widths in held] == [each] * devices
    assert all({9 - width for width in widths} == set(widths) for widths in held)


def test_paired_deals_out_the_middle_where_devices_hold_an_odd_number():
    config = one_of_each([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert widths_held(config, paired(config, 3)) == [[1, 4, 9], [2, 5, 8], [3, 6, 7]]
    assert widths_held(config, paired(config, 9)) == [[width] for width in range(1, 10)]


def test_packed_copies_the_heaviest_experts_and_balances():
    """Loads 8, 4, 2, 2 on two devices of three slots: 8 and then 4 are copied (a third copy of 8 fits nowhere), and
    4 + 2 + 2 stands on each device."""
    config = make_config(**ONE_GROUP | {"num_experts_per_group": 4})
    allocation = packed(config, 2, torch.tensor([8, 4, 2, 2]))
    assert allocation.devices == ((0, 1, 2), (0, 1, 3))
    assert (allocation.shares(4) @ torch.tensor([8.0, 4, 2, 2], dtype=torch.float64)).tolist() == [8, 8]


def test_packed_weighs_choices_by_width():
    """Work 1 x 30, 2 x 20, 30 x 1 and 40 x 1: choices alone would copy the last two."""
    config = one_of_each([1, 2, 30, 40])
    allocation = packed(config, 2, torch.tensor([30, 20, 1, 1]))
    copied = [expert for expert in range(4) if sum(expert in held for held in allocation.devices) == 2]
    assert copied == [1, 3]


def test_packed_takes_even_choices_without_a_load():
    config = make_config(**UNEQUAL)
    assert packed(config, 4) == packed(config, 4, torch.full((24,), 7))
    assert packed(config, 4) != packed(config, 4, torch.arange(24))


def test_packed_levels_skewed_traffic():
    """Zipf's law over 64 experts of one width: what is left is close to even."""
    config = make_config(**ONE_GROUP | {"num_experts_per_group": 64})
    load = 1 / torch.arange(1, 65, dtype=torch.float64)
    for rule, bounds in ((packed, (1, 1.03)), (contiguous, (4, 5))):
        work = rule(config, 8, load).shares(64) @ load
        assert bounds[0] <= work.max() / work.mean() <= bounds[1]


@pytest.mark.parametrize("seed", range(40))
def test_packed_fills_equal_slots_with_distinct_experts_for_any_load(seed):
    generator = random.Random(seed)
    experts, devices = generator.randint(1, 20), generator.randint(1, 9)
    config = make_config(**ONE_GROUP | {"num_experts_per_group": experts, "num_experts_per_tok": 1})
    load = torch.tensor([generator.choice([0, 0, 1, 1, 2, 50, generator.random()]) for _ in range(experts)])
    held = packed(config, devices, load).devices
    assert len(held) == devices
    assert {len(ids) for ids in held} == {min(experts // devices + 1, experts)}
    assert all(len(set(ids)) == len(ids) for ids in held)
    assert set().union(*held) == set(range(experts))


@pytest.mark.parametrize("overrides", [UNEQUAL, ONE_GROUP], ids=["unequal", "one group"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_every_choice_is_computed_exactly_once(name, devices, overrides):
    config = make_config(**overrides)
    load = torch.arange(config.num_experts) ** 2
    allocation = ALLOCATIONS[name](config, devices, load)
    assert allocation.name == name
    shares = allocation.shares(config.num_experts)
    assert shares.dtype == torch.float64
    for expert in range(config.num_experts):
        holders = [device for device, held in enumerate(allocation.devices) if expert in held]
        expected = [float(Fraction(device in holders, len(holders))) for device in range(devices)]
        assert shares[:, expert].tolist() == expected
    if name != "packed":
        assert sorted(expert for held in allocation.devices for expert in held) == list(range(config.num_experts))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_one_device_holds_every_expert_once(name):
    assert ALLOCATIONS[name](make_config(**UNEQUAL), 1, None).devices == (tuple(range(24)),)


def test_fitting_devices_divide_the_sets_of_all_layers():
    assert fitting_devices(make_config(**UNEQUAL)) == [1, 2, 4]
    assert fitting_devices(make_config(num_experts_per_group=12)) == [1, 2, 3, 4, 6, 12]
    mixed = make_config(num_experts_per_group=[8, 16, 24], per_layer_config={1: {"num_experts_per_group": [12, 4, 4]}})
    assert fitting_devices(mixed) == [1, 2, 4]
    with pytest.raises(ValueError, match="mlp_only_layers"):
        fitting_devices(make_config(mlp_only_layers=[0, 1]))


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (6, "6 does not divide the 8 sets of experts: use 4 or 8 (1, 2, 4, 8 fit)"),
        (100, "100 does not divide the 8 sets of experts: use 8 (1, 2, 4, 8 fit)"),
        (0, "0 does not divide the 8 sets of experts: use 1 (1, 2, 4, 8 fit)"),
    ],
)
def test_a_misfit_names_the_nearest_numbers_that_fit(devices, expected):
    assert misfit(devices, [1, 2, 4, 8]) == expected


def test_rules_refuse_numbers_of_devices_that_do_not_divide():
    config = make_config(**UNEQUAL)
    with pytest.raises(ValueError, match=r"`devices` 3 does not divide the 4 sets of experts: use 2 or 4"):
        all_size(config, 3)
    for rule in (contiguous, paired):
        with pytest.raises(ValueError, match=r"`devices` 5 does not divide the 24 experts"):
            rule(config, 5)
