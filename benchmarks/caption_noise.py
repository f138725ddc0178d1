"""What real captions name, leave out and contradict: the published captions of RegDB beside the synthetic ones.

    python -m benchmarks.caption_noise FOLDER

FOLDER has `caption_dict_Blip_RGB.json` and `caption_llm_dict_Blip_IR.json` of the paper's authors. Attributes are read
from the sentences with word lists: the first garment of each kind, and the last colour before it in its own phrase. A
person of RegDB wears the same clothes in all images of one modality, so two captions that name different values
contradict each other. If errors are independent, a share `d` of contradicting pairs means that a share
`1 - sqrt(1 - d)` of the named values is wrong; garments that have two names (a shirt under an open jacket) count as
contradictions, so this is an upper limit. The synthetic captions are read by the same words. Writes
`benchmarks/results/caption_noise.json` and `.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tvilfm.data.manifest import select
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout

RESULTS = Path(__file__).parent / "results"
FILES = {"visible": "caption_dict_Blip_RGB.json", "infrared": "caption_llm_dict_Blip_IR.json"}
SYNTHETIC = Size(train=6, val=2, test=100, images_per_camera=4)
WORDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "sex": {"man": ("man", "boy", "guy", "male"), "woman": ("woman", "lady", "girl", "female")},
    "hair": {
        "bun": ("ponytail", "bun", "tied"),
        "long": ("long", "lengthy", "shoulder"),
        "short": ("short", "brief", "bald", "quick", "cropped"),
    },
    "top": {
        "jacket": ("jacket", "blazer", "hoodie"),
        "coat": ("coat", "overcoat"),
        "t-shirt": ("tshirt", "tee"),
        "sweater": ("sweater", "sweatshirt"),
        "shirt": ("shirt",),
        "top": ("top", "blouse", "kurta", "kurti"),
        "dress": ("dress", "frock"),
    },
    "bottom": {
        "trousers": ("jeans", "pants", "pant", "denims", "trousers", "leggings", "jeggings", "joggers", "pajama"),
        "shorts": ("shorts",),
        "skirt": ("skirt",),
    },
    "shoes": {
        "boots": ("boots", "boot"),
        "sandals": ("sandals", "slippers", "heels"),
        "shoes": ("shoes", "sneakers", "footwear", "shoe"),
    },
    "bag": {
        "backpack": ("backpack", "rucksack"),
        "handbag": ("handbag", "purse"),
        "bag": ("bag", "sling"),
    },
}
COLOURS: Mapping[str, Sequence[str]] = {
    "black": ("black",),
    "white": ("white", "cream", "beige"),
    "gray": ("grey", "gray"),
    "red": ("red", "maroon", "crimson", "wine"),
    "blue": ("blue",),
    "green": ("green", "olive"),
    "yellow": ("yellow",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "orange": ("orange",),
    "brown": ("brown",),
    "blonde": ("blonde",),
}
COLOURED = {"hair": "hair_colour", "top": "top_colour", "bottom": "bottom_colour", "shoes": "shoe_colour"}
ATTRIBUTES = (
    "sex",
    "hair",
    "hair_colour",
    "top",
    "top_colour",
    "bottom",
    "bottom_colour",
    "shoes",
    "shoe_colour",
    "bag",
)
_VALUE_OF = {word: (part, value) for part, values in WORDS.items() for value, words in values.items() for word in words}
_COLOUR_OF = {word: colour for colour, words in COLOURS.items() for word in words}


def attributes_of(sentence: str) -> dict[str, str]:
    """Return the attributes that a sentence names."""
    text = re.sub(r"\bt ?- ?shirt|\bt shirt|short sleeved shirt", "tshirt", sentence.lower())
    named: dict[str, str] = {}
    hair = re.search(r"\b(hair|ponytail|bun)\b", text)
    rest = text[hair.end() :] if hair else text
    words_of_hair = re.split(r"\bwith\b|\bhas\b", text[: hair.end()])[-1] if hair else ""
    for word in re.findall(r"[a-z]+", words_of_hair):
        if _VALUE_OF.get(word, ("",))[0] == "hair":
            named.setdefault("hair", _VALUE_OF[word][1])
        elif word in _COLOUR_OF:
            named["hair_colour"] = _COLOUR_OF[word]
    colour = None
    for word in re.findall(r"[a-z]+|,", rest):
        if word in ("and", "with", ",", "has"):
            colour = None  # another phrase
        colour = _COLOUR_OF.get(word, colour)
        part, value = _VALUE_OF.get(word, ("", ""))
        if part in ("", "sex", "hair"):
            continue
        if part not in named and colour is not None and part in COLOURED:
            named[COLOURED[part]] = colour
        named.setdefault(part, value)
        colour = None
    for word in re.findall(r"[a-z]+", text):
        if _VALUE_OF.get(word, ("",))[0] == "sex":
            named.setdefault("sex", _VALUE_OF[word][1])
    return named


def measure(captions: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return what captions name and contradict.

    Args:
        captions: (person, sentence); only captions of the same person are compared.
    """
    people: dict[str, list[dict[str, str]]] = defaultdict(list)
    lengths = []
    for person, sentence in captions:
        people[person].append(attributes_of(sentence))
        lengths.append(len(sentence.split()))
    every = [named for own in people.values() for named in own]
    rows = {}
    for name in ATTRIBUTES:
        pairs = [
            one[name] != other[name]
            for own in people.values()
            for one, other in combinations(own, 2)
            if name in one and name in other
        ]
        apart = float(np.mean(pairs)) if pairs else None
        rows[name] = {
            "named": round(float(np.mean([name in named for named in every])), 3),
            "contradicted": None if apart is None else round(apart, 3),
            "wrong_at_most": None if apart is None else round(1 - float(np.sqrt(1 - apart)), 3),
        }
    words = [float(value) for value in np.percentile(lengths, [5, 50, 95])]
    return {"captions": len(every), "people": len(people), "words_5_50_95": words, "attributes": rows}


def _published(folder: Path, name: str) -> list[tuple[str, str]]:
    content = json.loads((folder / name).read_text())
    return [(Path(path).parent.name, entry["description"]) for path, entry in content.items()]


def _synthetic(modality: str) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "synthetic"
        write_sysu_layout(root, SYNTHETIC, seed=0)
        manifest = read_dataset("synthetic", root)
        captions = read_captions(manifest, root, None)
    people = dict(zip(manifest["image"].to_pylist(), manifest["pid"].to_pylist(), strict=True))
    kept = set(select(manifest, split=("query", "gallery"), modality=modality)["image"].to_pylist())
    rows = zip(captions["image"].to_pylist(), captions["caption"].to_pylist(), strict=True)
    return [(str(people[image]), sentence) for image, sentence in rows if image in kept]


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the published captions of RegDB")
    folder = parser.parse_args().folder
    record: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    for modality, name in FILES.items():
        record[f"RegDB, {modality}"] = measure(_published(folder, name))
        record[f"synthetic, {modality}"] = measure(_synthetic(modality))
    (RESULTS / "caption_noise.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "caption_noise.md").write_text(_markdown(record))


def _markdown(record: Mapping[str, Any]) -> str:
    names = [name for name in record if name != "date"]
    lines = [
        f"`python -m benchmarks.caption_noise`, {record['date']}. Per attribute: share of captions that name it / "
        "share of pairs of captions of one person that name different values / share of named values that is wrong at "
        "most.",
        "",
        "| attribute | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for attribute in ATTRIBUTES:
        cells = []
        for name in names:
            row = record[name]["attributes"][attribute]
            values = (row["named"], row["contradicted"], row["wrong_at_most"])
            cells.append(" / ".join("-" if value is None else f"{value:.2f}" for value in values))
        lines.append(f"| {attribute} | " + " | ".join(cells) + " |")
    words = [" / ".join(f"{value:.0f}" for value in record[name]["words_5_50_95"]) for name in names]
    lines.append("| words per caption (5 %, 50 %, 95 %) | " + " | ".join(words) + " |")
    counts = [f"{record[name]['captions']} of {record[name]['people']} people" for name in names]
    lines.append("| captions | " + " | ".join(counts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
