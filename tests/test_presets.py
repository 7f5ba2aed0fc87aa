"""Presets: knobs turn them, and what is out of range is named."""

import pytest

from stkit.bench.plans import make_plan
from stkit.bench.presets import OOD_DRESSINGS, PRESETS, preset
from stkit.runtime import BadUse


def test_knobs_turn_a_preset():
    made = preset("tiny", turns=(1, 1), landmarks=(0, 2), light=(120, 125), resolution=(64, 48), textures=("panel",))
    plan = make_plan(0, 0, made)
    assert len(plan.turns) == 1 and plan.dressing == "panel" and 120 <= plan.light <= 125
    assert (made.width, made.height) == (64, 48)
    assert make_plan(0, 0, preset("tiny", turns=(0, 0), landmarks=(0, 0), actions=(0, 0))).turns == ()


def test_out_of_distribution_is_longer_darker_and_dressed_otherwise():
    for name in PRESETS:
        plain, made = preset(name), preset(name, ood=True)
        assert made.ood and not plain.ood
        assert sum(made.turns) > sum(plain.turns) and made.light[1] < plain.light[0]
        assert not {*made.textures} & {*plain.textures} and {*made.textures} == {*OOD_DRESSINGS}


def test_unseen_textures_are_for_out_of_distribution_builds_alone():
    assert preset("tiny", ood=True, textures=("rust",)).textures == ("rust",)
    for dressing in OOD_DRESSINGS:
        with pytest.raises(BadUse, match="--ood"):
            preset("tiny", textures=dressing)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"turns": (3, 2)}, "turns"),
        ({"turns": 3}, "turns=3"),
        ({"turns": (1, 99)}, "99"),
        ({"turns": (1.5, 2)}, "1.5"),
        ({"landmarks": (3, 13)}, "13"),
        ({"landmarks": (2, 9)}, "room for 6"),
        ({"actions": (1, 7)}, "7"),
        ({"light": (160, 300)}, "300"),
        ({"light": (0, 200)}, "from 115 to 255 .*nothing can be seen"),
        ({"resolution": (161, 120)}, "161"),
        ({"resolution": "big"}, "big"),
        ({"textures": ("velvet",)}, "velvet"),
        ({"textures": ()}, "none"),
        ({"textures": 5}, "5 is unknown"),
        ({"textures": ("stone", "rust")}, "'rust' is for out-of-distribution builds: add --ood"),
        ({"doors": (1, 2)}, "doors"),
    ],
)
def test_a_knob_out_of_range_is_named(knobs, named):
    with pytest.raises(BadUse, match=named) as caught:
        preset("tiny", **knobs)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_named():
    with pytest.raises(BadUse, match="'huge'.*tiny, default"):
        preset("huge")
