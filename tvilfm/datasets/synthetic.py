"""The synthetic tri-modal benchmark: rendered pedestrians, honest enough to learn from and to fail on.

Every person is a combination of attributes. Some survive in infrared (sex, hair style, garments, pattern, bag, hat):
together they are the person's *archetype*, and only 24 archetypes exist, so about every fifth stranger looks the same
to an infrared camera. The rest is colour, which only visible cameras and visible captions know. Infrared retrieval is
therefore ambiguous by construction and text can resolve it; a method that ignores the text stays near the archetypes'
ceiling.

The surprising choice is the infrared reflectance: a garment's brightness in infrared is a mixture of its visible
luminance and a random constant of its material, fixed for the person. Infrared images of one person so agree with
each other (infrared-to-infrared retrieval works) while their brightness tells little about colour.

Captions are written from what the *rendered image* shows, with the faults of real captioners: an attribute left out,
a wrong one, other words for the same thing, filler words. The files on disk have the exact layout of SYSU-MM01, RegDB,
LLCM or one's own folder, including the published caption files, so the reader of the real dataset reads them.
"""

from __future__ import annotations

import colorsys
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFilter

from tvilfm.data.captions import write_published
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest

Layout = Literal["sysu_mm01", "regdb", "llcm", "folder"]

IMAGE_HEIGHT, IMAGE_WIDTH = 96, 48
SUPERSAMPLING = 3
NUM_ARCHETYPES = 24
VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)
FEW_SHOTS = 300  # drawn in less time than it takes to start processes

SHAPE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sex": ("man", "woman"),
    "hair": ("short", "long", "ponytail"),
    "top": ("t-shirt", "shirt", "jacket", "coat"),
    "pattern": ("plain", "striped", "checked"),
    "bottom": ("trousers", "shorts", "skirt"),
    "bag": ("none", "backpack", "handbag"),
    "hat": ("none", "cap"),
}
RGB: dict[str, tuple[int, int, int]] = {
    "black": (28, 28, 32),
    "white": (236, 236, 232),
    "gray": (128, 128, 132),
    "red": (196, 34, 40),
    "blue": (36, 74, 186),
    "green": (38, 130, 62),
    "yellow": (228, 200, 44),
    "purple": (120, 48, 150),
    "pink": (232, 132, 170),
    "orange": (232, 122, 30),
    "brown": (112, 72, 40),
    "blonde": (214, 178, 104),
}
COLOUR_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "top_colour": ("black", "white", "gray", "red", "blue", "green", "yellow", "purple", "pink", "orange"),
    "bottom_colour": ("black", "white", "gray", "blue", "green", "brown"),
    "shoe_colour": ("black", "white", "red", "blue", "brown"),
    "hair_colour": ("black", "brown", "blonde", "gray"),
    "bag_colour": ("black", "red", "blue", "brown"),
}
ATTRIBUTES = {**SHAPE_ATTRIBUTES, **COLOUR_ATTRIBUTES}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many identities a benchmark size has and how many images each camera takes of one."""

    train: int
    val: int
    test: int
    images_per_camera: int


SIZES = {
    "tiny": Size(train=24, val=8, test=16, images_per_camera=1),
    "small": Size(train=800, val=80, test=120, images_per_camera=2),
    "large": Size(train=7000, val=700, test=700, images_per_camera=2),
}


def _archetypes() -> list[dict[str, str]]:
    """The 24 colour-free looks that exist: spread over the product of the shape attributes, the same in every run."""
    every = list(product(*SHAPE_ATTRIBUTES.values()))
    order = np.random.default_rng(20240).permutation(len(every))
    chosen = [every[order[0]]]
    # Farthest-point selection, so that two archetypes differ in two attributes or more.
    for _ in range(NUM_ARCHETYPES - 1):
        distances = [min(sum(a != b for a, b in zip(every[i], c, strict=True)) for c in chosen) for i in order]
        chosen.append(every[order[int(np.argmax(distances))]])
    return [dict(zip(SHAPE_ATTRIBUTES, look, strict=True)) for look in chosen]


@dataclass(frozen=True, kw_only=True)
class Person:
    """One identity: what every picture and every caption of it is made from."""

    pid: int
    attributes: dict[str, str]
    reflectance: dict[str, float]  # brightness in infrared of each part, 0-1


def draw_people(num_identities: int, *, seed: int, first_pid: int = 1, archetypes: bool = True) -> list[Person]:
    """Draw identities; no two have the same attributes.

    Args:
        num_identities: how many.
        seed: the benchmark's seed.
        first_pid: pid of the first; the rest follow.
        archetypes: take the look from the 24 archetypes (the benchmark) or from the whole product (pre-training).

    Raises:
        ValueError: when more identities are asked for than attribute combinations exist.
    """
    looks = (
        _archetypes()
        if archetypes
        else [dict(zip(SHAPE_ATTRIBUTES, look, strict=True)) for look in product(*SHAPE_ATTRIBUTES.values())]
    )
    capacity = len(looks) * int(np.prod([len(values) for values in COLOUR_ATTRIBUTES.values()]))
    if num_identities > capacity:
        raise ValueError(f"identities: expected at most {capacity}, got {num_identities}. Ask for fewer.")
    rng = np.random.default_rng([seed, 1])
    seen: set[tuple[str, ...]] = set()
    people: list[Person] = []
    while len(people) < num_identities:
        attributes = dict(looks[len(people) % len(looks)] if archetypes else looks[rng.integers(len(looks))])
        attributes |= {name: values[_skewed(len(values), rng)] for name, values in COLOUR_ATTRIBUTES.items()}
        material = {part: float(rng.uniform(0.15, 0.95)) for part in ("top", "bottom", "shoe", "bag")}
        key = tuple(attributes.values())
        if key in seen:
            continue
        seen.add(key)
        reflectance = {
            part: 0.25 * _luminance(RGB[attributes[f"{part}_colour"]]) + 0.75 * value
            for part, value in material.items()
        }
        reflectance["hair"] = 0.35 + 0.2 * _luminance(RGB[attributes["hair_colour"]])
        people.append(Person(pid=first_pid + len(people), attributes=attributes, reflectance=reflectance))
    return people


def _skewed(count: int, rng: np.random.Generator) -> int:
    """An index, early ones more likely: as in the street, black, white and gray are common and orange is rare."""
    weights = 1.0 / (np.arange(count) + 2.0)
    return int(rng.choice(count, p=weights / weights.sum()))


def _luminance(rgb: tuple[int, int, int]) -> float:
    return (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255.0


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A picture and which attributes can be seen in it."""

    pixels: npt.NDArray[np.uint8]  # H x W x 3
    seen: frozenset[str]


def render(person: Person, camid: int, index: int, *, seed: int) -> Rendering:
    """Render one crop: the person's fixed look under the camera's light, pose, background, noise and occlusion.

    Args:
        person: who.
        camid: 1, 2, 4, 5 visible; 3, 6 infrared (as in SYSU-MM01).
        index: which image of this person in this camera.
        seed: the benchmark's seed; the same four arguments give the same bytes.

    Returns:
        96 x 48 x 3 uint8 (infrared: three equal channels) and the attributes that are visible in it.
    """
    rng = np.random.default_rng([seed, 2, person.pid, camid, index])
    camera = np.random.default_rng([seed, 3, camid])
    infrared = camid in INFRARED_CAMERAS
    scale = SUPERSAMPLING
    width, height = IMAGE_WIDTH * scale, IMAGE_HEIGHT * scale
    canvas = _background(camera, rng, width, height, infrared)
    draw = ImageDraw.Draw(canvas)

    def paint(part: str) -> tuple[int, int, int]:
        if infrared:
            value = int(255 * (0.9 if part == "skin" else person.reflectance[part]))
            return value, value, value
        return (214, 170, 140) if part == "skin" else RGB[person.attributes[f"{part}_colour"]]

    _draw_person(draw, person.attributes, paint, rng, width, height, scale)
    hidden: frozenset[str] = frozenset()
    if rng.random() < 0.12:
        hidden = _occlude(draw, rng, width, height, infrared)
    if rng.random() < 0.5:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = canvas.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.BOX)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.5))))

    values = np.asarray(canvas, dtype=np.float32) / 255.0
    values = np.power(values, camera.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07))
    values *= camera.uniform(0.85, 1.1) * rng.uniform(0.92, 1.08)
    if infrared:
        rows = np.linspace(-1, 1, IMAGE_HEIGHT)[:, None] ** 2
        columns = np.linspace(-1, 1, IMAGE_WIDTH)[None, :] ** 2
        values *= (1.0 - 0.15 * (rows + columns))[:, :, None]
        values += rng.normal(0.0, 0.025, values.shape[:2])[:, :, None]
    else:
        values *= camera.uniform(0.92, 1.08, 3)
        values += rng.normal(0.0, 0.02, values.shape)
    pixels = (np.clip(values, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Rendering(pixels=pixels, seen=frozenset(ATTRIBUTES) - hidden)


def _background(
    camera: np.random.Generator, rng: np.random.Generator, width: int, height: int, infrared: bool
) -> Image.Image:
    hue, saturation = camera.random(), 0.0 if infrared else camera.uniform(0.05, 0.25)
    value = camera.uniform(0.25, 0.4) if infrared else camera.uniform(0.45, 0.75)

    def shade(factor: float) -> tuple[int, int, int]:
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value * factor))
        return int(red * 255), int(green * 255), int(blue * 255)

    canvas = Image.new("RGB", (width, height), shade(rng.uniform(0.9, 1.1)))
    draw = ImageDraw.Draw(canvas)
    horizon = int(height * rng.uniform(0.55, 0.75))
    draw.rectangle((0, horizon, width, height), fill=shade(rng.uniform(0.65, 0.8)))
    for _ in range(int(rng.integers(0, 4))):
        x, y = int(rng.uniform(-0.1, 0.9) * width), int(rng.uniform(0, 0.6) * height)
        box = (x, y, x + int(rng.uniform(0.1, 0.4) * width), y + int(rng.uniform(0.1, 0.5) * height))
        draw.rectangle(box, fill=shade(rng.uniform(0.8, 1.25)))
    return canvas


def _occlude(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, infrared: bool
) -> frozenset[str]:
    """Put a bench or a pillar before the person; returns the attributes it hides."""
    fill = (90, 90, 90) if infrared else tuple(int(v) for v in rng.integers(60, 140, 3))
    if rng.random() < 0.6:
        draw.rectangle((0, int(height * rng.uniform(0.72, 0.82)), width, height), fill=fill)
        return frozenset({"shoe_colour"})
    left = rng.random() < 0.5
    depth = int(width * rng.uniform(0.15, 0.3))
    draw.rectangle((0, 0, depth, height) if left else (width - depth, 0, width, height), fill=fill)
    return frozenset()


def _draw_person(draw, attributes, paint, rng, width, height, scale) -> None:  # type: ignore[no-untyped-def]
    """Draw back to front: rear bag, legs, shoes, arms, torso and its pattern, head, hair, hat, hand bag."""
    woman = attributes["sex"] == "woman"
    size = rng.uniform(0.92, 1.04)
    centre = width * (0.5 + rng.uniform(-0.06, 0.06))
    head_y = height * (0.115 + rng.uniform(-0.015, 0.02))
    unit = height * 0.01 * size

    shoulder = (8.2 if woman else 10.2) * unit
    hip = (7.6 if woman else 6.8) * unit
    neck_y = head_y + 7.5 * unit
    waist_y = neck_y + 28 * unit
    foot_y = min(height * 0.985, waist_y + 43 * unit)
    stride = rng.uniform(0.6, 3.6) * unit
    swing = rng.uniform(-2.5, 2.5) * unit

    if attributes["bag"] == "backpack":
        draw.rounded_rectangle(
            (
                centre - shoulder - 3.2 * unit,
                neck_y + 2 * unit,
                centre + shoulder + 3.2 * unit,
                neck_y + 19 * unit,
            ),
            radius=4 * unit,
            fill=paint("bag"),
        )

    leg_width = 2.9 * unit
    bare_from = {"trousers": 1.0, "shorts": 0.42, "skirt": 0.55}[attributes["bottom"]]
    for side in (-1, 1):
        top_x, foot_x = centre + side * hip * 0.5, centre + side * (hip * 0.5 + stride)
        draw.line((top_x, waist_y, foot_x, foot_y), fill=paint("skin"), width=int(leg_width * 1.6))
        if attributes["bottom"] != "skirt":
            knee = (top_x + (foot_x - top_x) * bare_from, waist_y + (foot_y - waist_y) * bare_from)
            draw.line((top_x, waist_y - unit, *knee), fill=paint("bottom"), width=int(leg_width * 2.3))
        draw.ellipse(
            (foot_x - 3.6 * unit, foot_y - 3.4 * unit, foot_x + 3.6 * unit, foot_y + 1.2 * unit),
            fill=paint("shoe"),
        )
    if attributes["bottom"] == "skirt":
        hem = waist_y + (foot_y - waist_y) * bare_from
        draw.polygon(
            [
                (centre - hip, waist_y - unit),
                (centre + hip, waist_y - unit),
                (centre + hip * 1.75, hem),
                (centre - hip * 1.75, hem),
            ],
            fill=paint("bottom"),
        )

    top_end = {"t-shirt": 0.0, "shirt": 1.0, "jacket": 2.0, "coat": 19.0}[attributes["top"]] * unit + waist_y
    for side in (-1, 1):
        start = (centre + side * shoulder * 0.92, neck_y + 3 * unit)
        end = (centre + side * (shoulder * 1.25) + swing, waist_y + 4 * unit)
        draw.line((*start, *end), fill=paint("skin"), width=int(3.2 * unit))
        reach = 0.42 if attributes["top"] == "t-shirt" else 0.93
        sleeve = (start[0] + (end[0] - start[0]) * reach, start[1] + (end[1] - start[1]) * reach)
        draw.line((*start, *sleeve), fill=_darker(paint("top"), 0.9), width=int(4.6 * unit))
    flare = 1.45 if attributes["top"] == "coat" else 1.0
    torso = [
        (centre - shoulder, neck_y + 1.2 * unit),
        (centre - 3 * unit, neck_y - 0.8 * unit),
        (centre + 3 * unit, neck_y - 0.8 * unit),
        (centre + shoulder, neck_y + 1.2 * unit),
        (centre + hip * flare, top_end),
        (centre - hip * flare, top_end),
    ]
    draw.polygon(torso, fill=paint("top"))
    stripe = _contrast(paint("top"))
    body = (neck_y + 2.5 * unit, top_end - unit)
    if attributes["pattern"] in ("striped", "checked"):
        for y in np.arange(body[0], body[1], 4.6 * unit):
            half = hip + (shoulder - hip) * max(0.0, (waist_y - y) / (waist_y - neck_y))
            draw.line((centre - half * 0.97, y, centre + half * 0.97, y), fill=stripe, width=max(1, int(1.5 * unit)))
    if attributes["pattern"] == "checked":
        for x in np.arange(-hip * 0.9, hip * 0.95, 3.8 * unit):
            draw.line((centre + x, body[0], centre + x, body[1]), fill=stripe, width=max(1, int(1.2 * unit)))
    if attributes["top"] in ("jacket", "coat"):
        draw.line((centre, neck_y, centre, top_end), fill=_darker(paint("top"), 0.45), width=int(1.5 * unit))
        draw.polygon(
            [
                (centre - 3 * unit, neck_y - unit),
                (centre + 3 * unit, neck_y - unit),
                (centre, neck_y + 8 * unit),
            ],
            fill=_contrast(paint("top")),
        )
    if attributes["bag"] == "backpack":
        for side in (-1, 1):
            x = centre + side * shoulder * 0.62
            draw.line((x, neck_y + 0.5 * unit, x, neck_y + 15 * unit), fill=paint("bag"), width=int(1.8 * unit))

    radius = 5.6 * unit
    hair = paint("hair")
    if attributes["hair"] == "long":
        for side in (-1, 1):
            near, far = sorted((centre + side * radius * 0.72, centre + side * radius * 1.5))
            draw.rounded_rectangle((near, head_y - radius, far, neck_y + 9 * unit), radius=2 * unit, fill=hair)
    if attributes["hair"] == "ponytail":
        draw.ellipse(
            (centre + radius * 0.7, head_y - radius * 0.6, centre + radius * 2.1, head_y + radius * 2.4),
            fill=hair,
        )
    draw.rectangle((centre - 2 * unit, head_y, centre + 2 * unit, neck_y + unit), fill=paint("skin"))
    draw.ellipse((centre - radius, head_y - radius * 1.2, centre + radius, head_y + radius * 1.2), fill=paint("skin"))
    draw.pieslice(
        (centre - radius * 1.12, head_y - radius * 1.35, centre + radius * 1.12, head_y + radius * 0.9),
        180,
        360,
        fill=hair,
    )
    if attributes["hat"] == "cap":
        cap = _darker(paint("top"), 0.6)
        draw.pieslice(
            (centre - radius * 1.25, head_y - radius * 1.75, centre + radius * 1.25, head_y + radius * 0.7),
            180,
            360,
            fill=cap,
        )
        draw.rectangle(
            (centre - radius * 1.25, head_y - radius * 0.62, centre + radius * 1.9, head_y - radius * 0.3),
            fill=cap,
        )
    if attributes["bag"] == "handbag":
        x, y = centre + shoulder * 1.3 + swing, waist_y + 4 * unit
        draw.arc((x - 3 * unit, y - 5 * unit, x + 3 * unit, y + 5 * unit), 180, 360, fill=paint("bag"), width=scale)
        draw.rounded_rectangle((x - 4.6 * unit, y, x + 4.6 * unit, y + 9 * unit), radius=unit, fill=paint("bag"))


def _darker(rgb: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return int(rgb[0] * factor), int(rgb[1] * factor), int(rgb[2] * factor)


def _contrast(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """A stripe that stands out on this ground: darker on bright cloth, brighter on dark cloth."""
    if _luminance(rgb) > 0.4:
        return _darker(rgb, 0.45)
    return min(255, rgb[0] + 110), min(255, rgb[1] + 110), min(255, rgb[2] + 110)


SYNONYMS: dict[str, tuple[str, ...]] = {
    "man": ("man", "guy", "male", "boy"),
    "woman": ("woman", "lady", "female", "girl"),
    "short": ("short", "cropped"),
    "long": ("long", "long open", "lengthy"),
    "t-shirt": ("t-shirt", "tee", "short sleeved shirt"),
    "shirt": ("shirt", "full sleeves shirt", "long sleeved top"),
    "jacket": ("jacket", "open jacket", "zipped jacket"),
    "coat": ("coat", "long coat", "overcoat"),
    "striped": ("striped", "stripy"),
    "checked": ("checked", "checkered", "plaid"),
    "trousers": ("trousers", "pants", "full length pants"),
    "shorts": ("shorts", "short pants"),
    "skirt": ("skirt", "knee length skirt"),
    "backpack": ("backpack", "rucksack", "bag on the back"),
    "handbag": ("handbag", "purse", "bag in the hand"),
    "cap": ("cap", "baseball cap", "hat"),
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
}
CONFUSED_COLOURS: dict[str, tuple[str, ...]] = {
    "black": ("gray", "brown"),
    "white": ("gray", "yellow"),
    "gray": ("white", "black"),
    "red": ("pink", "orange"),
    "blue": ("purple", "black"),
    "green": ("black", "blue"),
    "yellow": ("orange", "white"),
    "purple": ("blue", "pink"),
    "pink": ("red", "white"),
    "orange": ("red", "yellow"),
    "brown": ("black", "red"),
    "blonde": ("brown", "gray"),
}
FILLERS = ("clearly ", "basically ", "existing ", "certainly ", "very modern ")


def observe(person: Person, rendering: Rendering, rng: np.random.Generator, *, infrared: bool) -> dict[str, str]:
    """What a captioner believes it sees: visible attributes, some missed, some wrong; no colours in infrared."""
    missed, wrong = (0.25, 0.12) if infrared else (0.25, 0.10)
    believed: dict[str, str] = {}
    for name, value in person.attributes.items():
        if name not in rendering.seen or (infrared and name in COLOUR_ATTRIBUTES):
            continue
        if name != "sex" and rng.random() < missed:
            continue
        if rng.random() < wrong:
            others = (
                CONFUSED_COLOURS[value]
                if name in COLOUR_ATTRIBUTES
                else [other for other in SHAPE_ATTRIBUTES[name] if other != value]
            )
            value = others[rng.integers(len(others))]
        believed[name] = value
    return believed


def write_sentence(believed: dict[str, str], rng: np.random.Generator) -> str:
    """One sentence in the manner of the published captions from what a captioner believes it sees."""

    def word(value: str) -> str:
        options = SYNONYMS.get(value, (value,))
        return options[rng.integers(len(options))]

    def phrase(*names: str, last: str) -> str:
        words = [word(believed[name]) for name in names if name in believed and believed[name] != "plain"]
        filler = FILLERS[rng.integers(len(FILLERS))] if rng.random() < 0.08 else ""
        return " ".join([f"{filler}{' '.join(words)}".strip(), last]).strip()

    hair = phrase("hair", "hair_colour", last="hair") if {"hair", "hair_colour"} & set(believed) else ""
    top = phrase("top_colour", "pattern", last=word(believed["top"]) if "top" in believed else "top")
    bottom = phrase("bottom_colour", last=word(believed["bottom"]) if "bottom" in believed else "bottoms")
    shoes = phrase("shoe_colour", last=("shoes", "footwear")[rng.integers(2)]) if "shoe_colour" in believed else ""
    carried = believed.get("bag", "none")
    bag = phrase("bag_colour", last=word(carried)) if carried != "none" else ""
    hat = word(believed["hat"]) if believed.get("hat", "none") != "none" else ""

    wears = ("wearing", "sporting", "dressed in")[rng.integers(3)]
    joins = ("with", "paired with", "and")[rng.integers(3)]
    sentence = f"a {word(believed['sex'])}"
    sentence += f" with {hair}," if hair else ""
    sentence += f" {wears} {_article(top)} {joins} {bottom}"
    sentence += f", {joins} {shoes}" if shoes else ""
    sentence += f", carrying {_article(bag)}" if bag else ""
    sentence += f", {('wearing', 'with')[rng.integers(2)]} a {hat} on the head" if hat else ""
    return sentence + "."


def _article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


@dataclass(frozen=True, kw_only=True)
class _Shot:
    person: Person
    camid: int
    index: int
    seed: int
    path: str


def _shoot(shot: _Shot, root: Path) -> tuple[str, str, str]:
    rendering = render(shot.person, shot.camid, shot.index, seed=shot.seed)
    rng = np.random.default_rng([shot.seed, 4, shot.person.pid, shot.camid, shot.index])
    believed = observe(shot.person, rendering, rng, infrared=shot.camid in INFRARED_CAMERAS)
    target = root / shot.path
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rendering.pixels).save(target, quality=92)
    return shot.path, write_sentence(believed, rng), write_sentence(believed, rng)


def write_layout(root: Path, size: Size, *, seed: int, layout: Layout = "sysu_mm01", archetypes: bool = True) -> None:
    """Write a benchmark as files in the exact layout of a dataset, so that the dataset's own reader reads it.

    Args:
        root: the folder to make; it must not exist.
        size: identities by split and images a camera. RegDB and LLCM have no validation list: their readers hold out
            every tenth of the `train + val` training identities.
        seed: same seed, same bytes.
        layout: sysu_mm01, regdb (ten splits), llcm (nine cameras, eight of them also infrared) or folder.
        archetypes: see `draw_people`.

    Raises:
        FileExistsError: when `root` exists.
    """
    writers = {
        "sysu_mm01": write_sysu_layout,
        "regdb": _write_regdb_layout,
        "llcm": _write_llcm_layout,
        "folder": _write_folder_layout,
    }
    writers[layout](root, size, seed=seed, archetypes=archetypes)


def write_sysu_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """Write a benchmark as files in SYSU-MM01's exact layout, captions in the published format.

    `cam{1..6}/{pid:04d}/{index:04d}.jpg`, `exp/{train,val,test}_id.txt`,
    `Text/Blip_{RGB,IR}/caption_llm_dict_Blip_{RGB,IR}.json`, and `attributes.json` (the truth, which no stage of the
    method reads but pre-training). The folder appears whole or not at all.

    Args:
        root: the folder to make; it must not exist.
        size: identities by split and images a camera.
        seed: same seed, same bytes.
        archetypes: see `draw_people`.

    Raises:
        FileExistsError: when `root` exists.
    """
    with _whole_or_nothing(root) as partial:
        people, split_of = _people(size, seed, archetypes)
        (partial / "exp").mkdir(parents=True)
        for split in ("train", "val", "test"):
            chosen = [person.pid for person in people if split_of[person.pid] == split]
            (partial / "exp" / f"{split}_id.txt").write_text(",".join(map(str, chosen)) + "\n")
        captions: dict[str, dict[str, dict[str, str]]] = {"RGB": {}, "IR": {}}
        for path, caption, rephrased in _shoot_all(partial, list(_shots(people, size.images_per_camera, seed))):
            sensor = "IR" if int(path[3]) in INFRARED_CAMERAS else "RGB"
            captions[sensor][path] = {"description": caption, "aug_description": rephrased}
        for sensor, entries in captions.items():
            folder = partial / "Text" / f"Blip_{sensor}"
            folder.mkdir(parents=True)
            (folder / f"caption_llm_dict_Blip_{sensor}.json").write_text(json.dumps(entries, indent=1))
        _write_truth(partial, people)


def _write_regdb_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """`{Visible,Thermal}/{pid}/*.bmp`, `idx/{train,test}_{visible,thermal}_{1..10}.txt`, and Text."""
    with _whole_or_nothing(root) as partial:
        people, _ = _people(size, seed, archetypes)
        shots = []
        for person in people:
            for folder, letter, camid in (("Visible", "v", 1), ("Thermal", "t", 3)):
                for index in range(size.images_per_camera):
                    sex = "male" if person.attributes["sex"] == "man" else "female"
                    side = ("front", "back")[index % 2]
                    number = person.pid * size.images_per_camera + index
                    path = f"{folder}/{person.pid}/{sex}_{side}_{letter}_{number:05d}_{person.pid}.bmp"
                    shots.append(_Shot(person=person, camid=camid, index=index, seed=seed, path=path))
        _write_captions(partial, shots, _shoot_all(partial, shots), key_root="datasets/regdb/")
        (partial / "idx").mkdir()
        pids = np.array([person.pid for person in people])
        for split in range(1, 11):
            order = np.random.default_rng([seed, 6, split]).permutation(pids)
            halves = {"train": order[: size.train + size.val], "test": order[size.train + size.val :]}
            for part, chosen in halves.items():
                label_of = {int(pid): label for label, pid in enumerate(sorted(chosen))}
                for sensor, folder in (("visible", "Visible"), ("thermal", "Thermal")):
                    paths = [s.path for s in shots if s.person.pid in label_of and s.path.startswith(folder)]
                    lines = [f"{path} {label_of[int(path.split('/')[1])]}\n" for path in paths]
                    (partial / "idx" / f"{part}_{sensor}_{split}.txt").write_text("".join(lines))
        _write_truth(partial, people)


def _write_llcm_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """`{vis,nir}/{pid:04d}/*.jpg`, test images also as `test_{vis,nir}/cam{c}/{pid:04d}/*`, `idx/*.txt`, and Text."""
    with _whole_or_nothing(root) as partial:
        people, split_of = _people(size, seed, archetypes)
        pids: dict[str, list[int]] = {"train": [], "test": []}
        for person in people:
            pids["test" if split_of[person.pid] == "test" else "train"].append(person.pid)
        shots = []
        copies: dict[str, str] = {}
        lists: dict[tuple[str, str], list[str]] = {(part, kind): [] for part in pids for kind in ("vis", "nir")}
        for part, chosen in pids.items():
            for label, pid in enumerate(chosen):
                person = people[pid - people[0].pid]
                for kind, cameras in (("vis", range(1, 10)), ("nir", (1, 2, 4, 5, 6, 7, 8, 9))):
                    for camera, number in product(cameras, range(size.images_per_camera)):
                        name = f"{pid:04d}_c{camera:02d}_s{100000 + camera}_f{1000 + number}_{kind}.jpg"
                        path = f"{kind}/{pid:04d}/{name}"
                        # Rendered as one of the two infrared cameras, or as a visible camera of its own.
                        camid = camera + 10 if kind == "vis" else INFRARED_CAMERAS[camera % 2]
                        index = camera * 1000 + number
                        shots.append(_Shot(person=person, camid=camid, index=index, seed=seed, path=path))
                        lists[part, kind].append(f"{path} {label}\n")
                        if part == "test":
                            copies[path] = f"test_{kind}/cam{camera}/{pid:04d}/{name}"
        _write_captions(partial, shots, _shoot_all(partial, shots), key_root="/data0/datasets/LLCM/")
        for source, target in copies.items():
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(partial / source, partial / target)
        (partial / "idx").mkdir()
        for (part, kind), lines in lists.items():
            (partial / "idx" / f"{part}_{kind}.txt").write_text("".join(lines))
        (partial / "idx" / "test_id.txt").write_text(",".join(map(str, pids["test"])) + "\n")
        _write_truth(partial, people)


def _write_folder_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """`{visible,infrared}/{pid}/{camid}/{index:04d}.jpg`, `splits.csv`, and Text."""
    with _whole_or_nothing(root) as partial:
        people, split_of = _people(size, seed, archetypes)
        shots = []
        for shot in _shots(people, size.images_per_camera, seed):
            modality = "infrared" if shot.camid in INFRARED_CAMERAS else "visible"
            path = f"{modality}/{shot.person.pid}/{shot.camid}/{shot.index + 1:04d}.jpg"
            shots.append(replace(shot, path=path))
        _write_captions(partial, shots, _shoot_all(partial, shots), key_root="")
        rows = [f"{person.pid},{split_of[person.pid]}\n" for person in people]
        (partial / "splits.csv").write_text("".join(["pid,split\n", *rows]))
        _write_truth(partial, people)


@contextmanager
def _whole_or_nothing(root: Path) -> Iterator[Path]:
    """A folder to write into that takes its name when the block ends."""
    if root.exists():
        raise FileExistsError(f"out: expected a folder that does not exist, got {root}. Choose another or remove it.")
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(root)


def _people(size: Size, seed: int, archetypes: bool) -> tuple[list[Person], dict[int, str]]:
    """The benchmark's people in order of pid, and who is for train, val and test."""
    counts = {"train": size.train, "val": size.val, "test": size.test}
    people = draw_people(sum(counts.values()), seed=seed, archetypes=archetypes)
    order = np.random.default_rng([seed, 5]).permutation(len(people))
    splits = [split for split, count in counts.items() for _ in range(count)]
    return people, {people[i].pid: split for i, split in zip(order, splits, strict=True)}


def _shoot_all(partial: Path, shots: Sequence[_Shot]) -> list[tuple[str, str, str]]:
    """Render every shot into the folder; (path, caption, rephrase) in the order given."""
    if len(shots) <= FEW_SHOTS:
        return [_shoot(shot, partial) for shot in shots]
    # spawn: a fork of a process that has threads (torch, ray) may hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_shoot, shots, [partial] * len(shots), chunksize=64))


def _write_captions(
    partial: Path, shots: Sequence[_Shot], written: Sequence[tuple[str, str, str]], *, key_root: str
) -> None:
    manifest = build_manifest(
        {
            "image": shot.path,
            "pid": shot.person.pid,
            "camid": shot.camid,
            "modality": "infrared" if shot.camid in INFRARED_CAMERAS else "visible",
            "split": "train",
        }
        for shot in shots
    )
    rows = [
        {"image": path, "caption": caption, "rephrased": rephrased, "captioner": "synthetic", "revision": None}
        for path, caption, rephrased in written
    ]
    captions = pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)
    write_published(partial / "Text", captions, manifest, key_root=key_root)


def _write_truth(partial: Path, people: Sequence[Person]) -> None:
    (partial / "attributes.json").write_text(json.dumps({str(p.pid): p.attributes for p in people}, indent=1))


def _shots(people: Sequence[Person], images_per_camera: int, seed: int) -> Iterator[_Shot]:
    for person in people:
        for camid in sorted((*VISIBLE_CAMERAS, *INFRARED_CAMERAS)):
            # Two infrared cameras against four visible ones: twice the shots keeps the modalities even.
            factor = 2 if camid in INFRARED_CAMERAS else 1
            for index in range(images_per_camera * factor):
                path = f"cam{camid}/{person.pid:04d}/{index + 1:04d}.jpg"
                yield _Shot(person=person, camid=camid, index=index, seed=seed, path=path)
