"""Marks of captions: exact on the synthetic benchmark, BLEU and CIDEr elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tvilfm.captioning.scores import (
    AttributeScore,
    Marks,
    attribute_scores,
    colour_share,
    language_scores,
    named_attributes,
)
from tvilfm.datasets.synthetic.people import COLOUR_ATTRIBUTES, SHAPE_ATTRIBUTES, draw_people
from tvilfm.datasets.synthetic.sentences import write_sentence


@pytest.mark.parametrize("infrared", [False, True])
def test_what_the_benchmark_writes_is_read_back_in_all_its_words(infrared: bool) -> None:
    rng = np.random.default_rng(0)
    for person in draw_people(300, seed=5, archetypes=False):
        believed = {
            name: value
            for name, value in person.attributes.items()
            if (name == "sex" or rng.random() < 0.75) and not (infrared and name in COLOUR_ATTRIBUTES)
        }
        spoken = {name: value for name, value in believed.items() if value not in ("plain", "none")}
        if believed.get("bag", "none") == "none":
            spoken.pop("bag_colour", None)
        assert named_attributes(write_sentence(believed, rng)) == spoken


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("A Man in a short sleeved shirt.", {"sex": "man", "top": "t-shirt"}),
        ("short pants and cropped hair", {"bottom": "shorts", "hair": "short"}),
        ("a grey stripy tee, carrying a bag on the back", {"top_colour": "gray", "pattern": "striped", "top": "t-shirt",
                                                          "bag": "backpack"}),
        ("violet footwear, a red hat", {"shoe_colour": "purple", "hat": "cap"}),
        ("long brown hair and a plaid top", {"hair": "long", "hair_colour": "brown", "pattern": "checked"}),
        ("a plaid skirt in a picture", {"bottom": "skirt"}),
        ("", {}),
    ],
)  # fmt: skip
def test_words_belong_to_the_noun_after_them(sentence: str, named: dict[str, str]) -> None:
    assert named_attributes(sentence) == named


def test_scores_count_by_hand() -> None:
    base = {name: values[0] for name, values in (SHAPE_ATTRIBUTES | COLOUR_ATTRIBUTES).items()}
    truths = [
        base | {"top": "coat", "top_colour": "red", "bag": "backpack", "bag_colour": "blue"},
        base | {"top": "coat", "top_colour": "blue", "pattern": "striped"},
        base | {"top": "shirt", "top_colour": "gray"},
    ]
    sentences = [
        "a man wearing a red coat, carrying a blue purse",
        "a man wearing a pink coat, carrying a red backpack",
        "a woman wearing a top",
    ]
    scores = attribute_scores(sentences, truths, "visible")
    assert scores["sex"] == AttributeScore(accuracy=pytest.approx(2 / 3), named=1.0)
    assert scores["top"] == AttributeScore(accuracy=1.0, named=pytest.approx(2 / 3))
    assert scores["top_colour"] == AttributeScore(accuracy=0.5, named=pytest.approx(2 / 3))
    # A bag that is not there is wrong; only one person has one to name.
    assert scores["bag"] == AttributeScore(accuracy=0.0, named=1.0)
    assert scores["bag_colour"] == AttributeScore(accuracy=0.5, named=1.0)
    assert scores["pattern"] == AttributeScore(accuracy=0.0, named=0.0)
    assert scores["garments"].accuracy == pytest.approx((1.0 + 0.0 + 0.0) / 3)
    assert scores["colours"].named == pytest.approx((2 / 3 + 0 + 0 + 0 + 1) / 5)
    assert attribute_scores(sentences, truths, "infrared").keys() == {*SHAPE_ATTRIBUTES, "garments"}
    assert colour_share(sentences) == pytest.approx(2 / 3)


def test_language_scores_see_words_only_and_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    references = ["a man in a red coat.", "a woman with long hair, walking", "a boy in shorts and a cap"]
    perfect = language_scores([text.upper().replace(",", "") for text in references], references)
    assert perfect["bleu4"] == pytest.approx(1.0, abs=1e-6) and perfect["cider"] == pytest.approx(10.0, abs=1e-6)
    mixed = language_scores([references[0], "a woman with short hair", "a man in a red coat"], references)
    assert 0 < mixed["bleu4"] < 1 and 0 < mixed["cider"] < 10
    assert capsys.readouterr().out == ""


def test_marks_survive_their_file_and_print_every_number(tmp_path: Path) -> None:
    marks = Marks(
        pictures=7,
        loss=1.234,
        bleu4=0.25,
        cider=1.5,
        colour_words=0.5,
        attributes={"top_colour": AttributeScore(accuracy=0.875, named=0.75)},
    )
    marks.write(tmp_path / "marks.json")
    assert Marks.read(tmp_path / "marks.json") == marks
    first, second = marks.lines()
    assert all(number in first for number in ("7", "1.234", "0.250", "1.50", "50.0%"))
    assert all(part in second for part in ("top colour", "87.5%", "75.0%"))
