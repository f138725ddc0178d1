"""The synthetic benchmark: repeatable, disjoint, and ambiguous exactly where it says so."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.free_sentences import BEGINNINGS, JOINS, PHRASES
from tvilfm.datasets.synthetic import people as people_module
from tvilfm.datasets.synthetic.layouts import SIZES, Size, write_sysu_layout
from tvilfm.datasets.synthetic.people import ATTRIBUTES, COLOUR_ATTRIBUTES, RGB, SHAPE_ATTRIBUTES, draw_people
from tvilfm.datasets.synthetic.rendering import INFRARED_CAMERAS, Rendering, render
from tvilfm.datasets.synthetic.sentences import (
    CONFUSED_COLOURS,
    SYNONYMS,
    observe,
    write_freely,
    write_rephrase,
    write_sentence,
)

TREE = Size(train=3, val=1, test=2, images_per_camera=1)
COLOUR_WORDS = set(RGB) | {word for colour in RGB for word in SYNONYMS.get(colour, ())}


def tree_hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same tree twice, then the tree of another seed."""
    folder = tmp_path_factory.mktemp("trees")
    roots = [folder / name for name in ("first", "again", "other")]
    for root, seed in zip(roots, (0, 0, 1), strict=True):
        write_sysu_layout(root, TREE, seed=seed)
    return roots


def ids_of(root: Path) -> dict[str, list[int]]:
    return {
        split: [int(pid) for pid in (root / "exp" / f"{split}_id.txt").read_text().split(",")]
        for split in ("train", "val", "test")
    }


def infrared_captions(root: Path) -> dict[str, dict[str, str]]:
    captions: dict[str, dict[str, str]] = json.loads((root / "Text/Blip_IR/caption_llm_dict_Blip_IR.json").read_text())
    return captions


def test_the_same_seed_writes_the_same_bytes(trees: list[Path]) -> None:
    first, again, _ = map(tree_hashes, trees)
    assert first == again
    assert len(first) == 6 * (4 + 2 * 2) + 3 + 2 + 1  # pictures, split files, caption files, attributes


def test_another_seed_writes_other_pictures_captions_and_splits(trees: list[Path]) -> None:
    first, _, other = map(tree_hashes, trees)
    pictures = [name for name in first if name.endswith(".jpg")]
    assert pictures == [name for name in other if name.endswith(".jpg")]
    assert not [name for name in pictures if first[name] == other[name]]
    assert (
        first["Text/Blip_RGB/caption_llm_dict_Blip_RGB.json"] != other["Text/Blip_RGB/caption_llm_dict_Blip_RGB.json"]
    )


def test_splits_have_their_sizes_and_are_disjoint(trees: list[Path], tiny_benchmark: Path) -> None:
    for root, size in ((trees[0], TREE), (tiny_benchmark, Size(train=6, val=2, test=4, images_per_camera=1))):
        ids = ids_of(root)
        assert [len(ids[split]) for split in ("train", "val", "test")] == [size.train, size.val, size.test]
        together = [pid for pids in ids.values() for pid in pids]
        assert len(set(together)) == len(together)
        assert set(map(str, together)) == set(json.loads((root / "attributes.json").read_text()))


def test_every_picture_has_a_caption_of_its_modality(trees: list[Path]) -> None:
    root = trees[0]
    for sensor, infrared in (("RGB", False), ("IR", True)):
        captions = json.loads((root / f"Text/Blip_{sensor}/caption_llm_dict_Blip_{sensor}.json").read_text())
        pictures = {str(path.relative_to(root)) for path in root.glob("cam*/*/*.jpg")}
        assert set(captions) == {name for name in pictures if (int(name[3]) in INFRARED_CAMERAS) == infrared}
        assert all(entry["description"] and entry["aug_description"] for entry in captions.values())


def test_infrared_pictures_on_disk_have_equal_channels_and_visible_ones_do_not(trees: list[Path]) -> None:
    for path in trees[0].glob("cam*/*/*.jpg"):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (96, 48, 3)
        equal = (pixels == pixels[:, :, :1]).all()
        assert equal == (int(path.parts[-3][3]) in INFRARED_CAMERAS), path


def test_infrared_captions_hold_no_colour_word(tiny_benchmark: Path) -> None:
    for entry in infrared_captions(tiny_benchmark).values():
        for text in entry.values():
            assert not COLOUR_WORDS & set(re.findall(r"[a-z-]+", text)), text


def test_no_infrared_observation_of_many_people_holds_a_colour() -> None:
    rng = np.random.default_rng(0)
    seen_colours = 0
    for person in draw_people(200, seed=3):
        rendering = Rendering(pixels=np.zeros((96, 48, 3), np.uint8), seen=frozenset(ATTRIBUTES))
        believed = observe(person, rendering, rng, infrared=True)
        assert not set(believed) & set(COLOUR_ATTRIBUTES)
        assert not COLOUR_WORDS & set(re.findall(r"[a-z-]+", write_sentence(believed, rng)))
        visible = write_sentence(observe(person, rendering, rng, infrared=False), rng)
        seen_colours += bool(COLOUR_WORDS & set(re.findall(r"[a-z-]+", visible)))
    assert seen_colours > 190


def test_a_captioner_names_only_what_the_picture_shows() -> None:
    person = draw_people(1, seed=0)[0]
    rendering = Rendering(pixels=np.zeros((96, 48, 3), np.uint8), seen=frozenset(ATTRIBUTES) - {"shoe_colour", "hat"})
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert not {"shoe_colour", "hat"} & set(observe(person, rendering, rng, infrared=False))


def test_captions_miss_and_mistake_attributes_as_often_as_said() -> None:
    rng = np.random.default_rng(1)
    missed, wrong, total = 0, 0, 0
    people = draw_people(300, seed=5)
    for person in people:
        rendering = Rendering(pixels=np.zeros((96, 48, 3), np.uint8), seen=frozenset(ATTRIBUTES))
        believed = observe(person, rendering, rng, infrared=False)
        assert "sex" in believed
        for name, value in person.attributes.items():
            if name != "sex":
                total += 1
                missed += name not in believed
                wrong += believed.get(name, value) != value
    assert missed / total == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / total) ** 0.5)
    assert wrong / total == pytest.approx(0.75 * 0.10, abs=5 * (0.075 * 0.925 / total) ** 0.5)


def test_a_confused_colour_is_another_colour_that_exists() -> None:
    assert set(CONFUSED_COLOURS) == set(RGB)
    for colour, others in CONFUSED_COLOURS.items():
        assert colour not in others and set(others) <= set(RGB)


def test_there_are_24_archetypes_and_each_is_used() -> None:
    looks = Counter(tuple(p.attributes[name] for name in SHAPE_ATTRIBUTES) for p in draw_people(500, seed=2))
    assert len(looks) == 24
    assert max(looks.values()) - min(looks.values()) <= 3
    for look in looks:
        assert min(sum(a != b for a, b in zip(look, other, strict=True)) for other in looks if other != look) >= 2


def test_pre_training_people_have_more_looks_than_archetypes() -> None:
    people = draw_people(300, seed=2, archetypes=False)
    assert len({tuple(p.attributes[name] for name in SHAPE_ATTRIBUTES) for p in people}) > 100


def test_no_two_people_share_all_attributes() -> None:
    size = SIZES["small"]
    people = draw_people(size.train + size.val + size.test, seed=0)
    assert len({tuple(sorted(person.attributes.items())) for person in people}) == len(people) == 1000
    assert [person.pid for person in people] == list(range(1, 1001))
    for person in people[:50]:
        assert all(person.attributes[name] in values for name, values in ATTRIBUTES.items())


def test_more_people_than_combinations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = 24 * 10 * 6 * 5 * 4 * 4
    with pytest.raises(ValueError, match=f"identities: expected at most {capacity}, got {capacity + 1}"):
        draw_people(capacity + 1, seed=0)
    monkeypatch.setattr(
        people_module, "COLOUR_ATTRIBUTES", {name: values[:1] for name, values in COLOUR_ATTRIBUTES.items()}
    )
    assert len({tuple(p.attributes.items()) for p in draw_people(24, seed=0)}) == 24


def test_infrared_brightness_of_a_garment_is_fixed_for_a_person_and_nearly_free_of_its_colour() -> None:
    people = draw_people(1000, seed=0)
    luminance = {name: (0.299 * r + 0.587 * g + 0.114 * b) / 255 for name, (r, g, b) in RGB.items()}
    colour = [luminance[person.attributes["top_colour"]] for person in people]
    brightness = [person.reflectance["top"] for person in people]
    assert 0.2 < np.corrcoef(colour, brightness)[0, 1] < 0.6
    assert [p.reflectance for p in draw_people(3, seed=0)] == [p.reflectance for p in people[:3]]


def test_rendering_is_a_function_of_its_arguments() -> None:
    person, other = draw_people(2, seed=0)
    first = render(person, 1, 0, seed=0)
    assert first.pixels.shape == (96, 48, 3) and first.pixels.dtype == np.uint8
    np.testing.assert_array_equal(first.pixels, render(person, 1, 0, seed=0).pixels)
    for changed in (
        render(person, 2, 0, seed=0),
        render(person, 1, 1, seed=0),
        render(person, 1, 0, seed=1),
        render(other, 1, 0, seed=0),
    ):
        assert (changed.pixels != first.pixels).any()
    infrared = render(person, 3, 0, seed=0).pixels
    np.testing.assert_array_equal(infrared, infrared[:, :, :1].repeat(3, axis=2))


def test_an_existing_folder_is_not_written_over(trees: list[Path]) -> None:
    before = tree_hashes(trees[0])
    with pytest.raises(FileExistsError, match=r"expected a folder that does not exist, got .*first"):
        write_sysu_layout(trees[0], TREE, seed=1)
    assert tree_hashes(trees[0]) == before
    assert not trees[0].with_name("first.partial").exists()


def named_in(text: str, attributes: dict[str, str]) -> set[str]:
    """Attributes whose value a text names, by its words."""

    def says(value: str) -> bool:
        return any(re.search(rf"\b{re.escape(word)}\b", text) for word in SYNONYMS.get(value, (value,)))

    return {name for name, value in attributes.items() if value not in ("none", "plain") and says(value)}


def test_free_sentences_name_all_or_some_attributes_in_many_orders() -> None:
    places: Counter[bool] = Counter()
    shorter = 0
    for person in draw_people(300, seed=5):
        rng = np.random.default_rng(person.pid)
        every = {name: value for name, value in person.attributes.items() if name not in ("sex", "bag_colour")}
        whole, some = (write_freely(person.attributes, rng, some=some) for some in (False, True))
        assert named_in(whole, every) == {name for name, value in every.items() if value not in ("none", "plain")}
        shorter += len(named_in(some, every)) < len(named_in(whole, every))
        shoes, others = re.search(r"shoes|footwear", whole), re.search("|".join(SYNONYMS["trousers"]), whole)
        if shoes and others:
            places[shoes.start() < others.start()] += 1
    assert shorter > 150 and min(places[True], places[False]) > 30
    assert write_freely({}, np.random.default_rng(0), some=True) in ("person.", "a person.")


def test_rephrases_of_infrared_images_stay_complete_and_have_the_form_of_captions() -> None:
    for person in draw_people(50, seed=5):
        looks = {name: value for name, value in person.attributes.items() if name in SHAPE_ATTRIBUTES}
        rephrase = write_rephrase(looks, np.random.default_rng(person.pid), infrared=True)
        assert rephrase == write_sentence(looks, np.random.default_rng(person.pid))


def test_the_phrases_of_the_benchmark_of_free_sentences_are_held_out_from_training() -> None:
    people = draw_people(400, seed=5)
    captions = " ".join(write_sentence(one.attributes, np.random.default_rng(one.pid)) for one in people)
    free = " ".join(
        write_freely(one.attributes, np.random.default_rng(one.pid), some=some)
        for one in people
        for some in (False, True)
    )
    templates = [*BEGINNINGS, *JOINS, *(template for options in PHRASES.values() for template in options)]
    parts = {part.strip() for template in templates for part in re.split(r"\{\d?\}", template)}
    own = {part for part in parts if len(part.split()) > 1 and part not in captions}
    assert len(own) > 8
    assert [part for part in own if part in free] == []
