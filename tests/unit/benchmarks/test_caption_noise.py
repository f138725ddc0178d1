"""What the benchmark of caption noise reads in a sentence."""

from __future__ import annotations

import pytest

from benchmarks.caption_noise import attributes_of, measure

OPEN = (
    "a woman with brown long open hair, wearing a black colour full sleeves top with dark blue colour denim jeans, and "
)
PONYTAIL = "a lady with a black ponytail wearing a grey t - shirt and red shorts. she is carrying a backpack."


def test_colours_belong_to_the_part_that_follows_them() -> None:
    assert attributes_of(OPEN + "white colour shoes on the bottom.") == {
        "sex": "woman",
        "hair": "long",
        "hair_colour": "brown",
        "top": "top",
        "top_colour": "black",
        "bottom": "trousers",
        "bottom_colour": "blue",
        "shoes": "shoes",
        "shoe_colour": "white",
    }
    named = attributes_of(PONYTAIL)
    assert (named["hair"], named["hair_colour"], named["top_colour"]) == ("bun", "black", "gray")
    assert (named["bottom_colour"], named["bag"]) == ("red", "backpack")


def test_only_captions_of_one_person_contradict_each_other() -> None:
    coat = "a man in a {} coat".format
    result = measure([("1", coat("red")), ("1", coat("blue")), ("1", coat("red")), ("2", coat("green"))])
    row = result["attributes"]["top_colour"]
    assert row["named"] == 1.0 and row["contradicted"] == pytest.approx(2 / 3, abs=1e-3)
    assert row["wrong_at_most"] == pytest.approx(1 - (1 / 3) ** 0.5, abs=1e-3)
    assert result["attributes"]["bag"] == {"named": 0.0, "contradicted": None, "wrong_at_most": None}
