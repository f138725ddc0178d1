"""The people of the synthetic benchmark: attributes that are visible in infrared, and colours that are not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

NUM_ARCHETYPES = 24
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


def _archetypes() -> list[dict[str, str]]:
    """Return the 24 archetypes, which are spread over all combinations of shape attributes and are always the same."""
    every = list(product(*SHAPE_ATTRIBUTES.values()))
    order = np.random.default_rng(20240).permutation(len(every))
    chosen = [every[order[0]]]
    # Farthest-point selection: two archetypes differ in at least two attributes.
    for _ in range(NUM_ARCHETYPES - 1):
        distances = [min(sum(a != b for a, b in zip(every[i], c, strict=True)) for c in chosen) for i in order]
        chosen.append(every[order[int(np.argmax(distances))]])
    return [dict(zip(SHAPE_ATTRIBUTES, look, strict=True)) for look in chosen]


@dataclass(frozen=True, kw_only=True)
class Person:
    """One identity; its images and captions are created from these attributes."""

    pid: int
    attributes: dict[str, str]
    reflectance: dict[str, float]  # brightness in infrared of each part, 0-1


def draw_people(num_identities: int, *, seed: int, first_pid: int = 1, archetypes: bool = True) -> list[Person]:
    """Draw identities with distinct attributes.

    Args:
        num_identities: number of identities.
        seed: seed of the benchmark.
        first_pid: pid of the first identity; the others follow.
        archetypes: use shape attributes of the 24 archetypes (benchmark); false = all combinations (pre-training).

    Raises:
        ValueError: there are fewer attribute combinations than `num_identities`.
    """
    looks = (
        _archetypes()
        if archetypes
        else [dict(zip(SHAPE_ATTRIBUTES, look, strict=True)) for look in product(*SHAPE_ATTRIBUTES.values())]
    )
    capacity = len(looks) * int(np.prod([len(values) for values in COLOUR_ATTRIBUTES.values()]))
    if num_identities > capacity:
        raise ValueError(f"identities: expected at most {capacity}, got {num_identities}. Lower the number.")
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
            part: 0.25 * luminance(RGB[attributes[f"{part}_colour"]]) + 0.75 * value for part, value in material.items()
        }
        reflectance["hair"] = 0.35 + 0.2 * luminance(RGB[attributes["hair_colour"]])
        people.append(Person(pid=first_pid + len(people), attributes=attributes, reflectance=reflectance))
    return people


def _skewed(count: int, rng: np.random.Generator) -> int:
    """Draw an index; low ones are more likely, because black, white and gray are common on the street."""
    weights = 1.0 / (np.arange(count) + 2.0)
    return int(rng.choice(count, p=weights / weights.sum()))


def luminance(rgb: tuple[int, int, int]) -> float:
    return (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255.0
