"""Attribute precision at 10: do sentences that no captioner wrote find people who look as they say?

    make demo && python -m benchmarks.free_sentences

Sentences of one to four attributes, with word orders and phrases that the benchmark's captions never have, search the
visible test images of the demo by text alone. An image is right if its person has all attributes of the sentence. A
sentence is used if at least ten images are right, so a precision of 1 is possible. Chance is the share of right images
in the gallery. Writes `benchmarks/results/free_sentences.json` and `.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.places.finished import finished_run
from cluster.run import evaluator_of
from tvilfm.config import load_config
from tvilfm.data.manifest import column
from tvilfm.datasets.synthetic.layouts import read_truth
from tvilfm.datasets.synthetic.people import ATTRIBUTES
from tvilfm.datasets.synthetic.sentences import write_sentence
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_texts
from tvilfm.models.similarity import similarity
from tvilfm.versions import version_of

RESULTS = Path(__file__).parent / "results"
TITLES = (
    "number of attributes",
    "number of attributes, with the sex, in the words of the captions",
    "the same attributes in own words",
    "kind of attribute",
)
TOP, PER_COUNT, DRAWS = 10, 100, 20_000
# A phrase names one attribute, or a garment or bag and its colour together. `{}` are the values, in this order.
PHRASES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("sex",): ("it is a {}", "the person is a {}"),
    ("hair",): ("the hair is {}", "the person has {} hair"),
    ("hair_colour",): ("{} hair",),
    ("top",): ("there is a {}", "the {} is easy to see"),
    ("top_colour", "top"): ("the {1} is {0}", "in a {0} {1}", "{0} {1}"),
    ("pattern",): ("the clothes on top are {}",),
    ("bottom",): ("{} on the legs",),
    ("bottom_colour", "bottom"): ("the {1} is {0}", "{0} {1} below"),
    ("shoe_colour",): ("the shoes are {}", "{} shoes"),
    ("bag",): ("a {} is there",),
    ("bag_colour", "bag"): ("the {1} is {0}", "someone carrying a {0} {1}"),
    ("hat",): ("a {} on the head",),
}
BEGINNINGS = ("", "", "looking for this person: ", "have you seen somebody? ")
JOINS = ("; ", ", and ", " and also ")


def draw_sentence(rng: np.random.Generator, attributes: Mapping[str, str], count: int) -> tuple[str, dict[str, str]]:
    """Return a sentence about some attributes of a person, and these attributes; fewer than `count` if no more fit.

    Args:
        rng: random numbers.
        attributes: of the person.
        count: number of attributes to name.
    """
    named: dict[str, str] = {}
    phrases = []
    for names in rng.permutation(np.array(list(PHRASES), dtype=object)):
        values = [attributes[name] for name in names]
        if set(names) & set(named) or len(named) + len(names) > count or {"none", "plain"} & set(values):
            continue
        options = PHRASES[tuple(names)]
        phrases.append(options[rng.integers(len(options))].format(*values))
        named |= dict(zip(names, values, strict=True))
    return BEGINNINGS[rng.integers(len(BEGINNINGS))] + JOINS[rng.integers(len(JOINS))].join(phrases) + ".", named


def measure(run: Path) -> dict[str, Any]:
    """Return the precision of sentences by number of attributes, and by kind of attribute.

    Args:
        run: folder of a run on the synthetic benchmark.
    """
    config = load_config(run / "config.yaml")
    evaluator = evaluator_of(config)
    protocol = get_protocol(config.evaluate.protocols[0])
    gallery = evaluator.gallery(protocol, 0)
    truth = read_truth(config.data_root)
    people = [truth[pid] for pid in column(gallery, "pid").tolist()]
    has_G = {
        name: {value: np.array([person[name] == value for person in people]) for value in values}
        for name, values in ATTRIBUTES.items()
    }
    rng, sentences = np.random.default_rng(0), dict[str, dict[str, str]]()
    for count in (1, 2, 3, 4):
        before = len(sentences)
        for _ in range(DRAWS):
            sentence, named = draw_sentence(rng, people[rng.integers(len(people))], count)
            right_G = np.all([has_G[name][value] for name, value in named.items()], axis=0)
            if len(named) == count and right_G.sum() >= TOP:
                sentences.setdefault(sentence, named)
            if len(sentences) - before == PER_COUNT:
                break
    with_sex = {sentence: named for sentence, named in sentences.items() if "sex" in named}
    captions = {sentence: write_sentence(named, rng) for sentence, named in with_sex.items()}
    texts = [*sentences, *captions.values()]
    finished = finished_run(config)
    model = TVILFM.from_pretrained(finished.here(finished.model)).eval()
    with torch.inference_mode():
        vectors_QD = model.embed(torch.from_numpy(encode_texts(model, texts)))
        scores_QG = similarity(vectors_QD, evaluator.image_vectors(gallery, base=False)).numpy()
    best_QK = dict(zip(texts, np.argsort(-scores_QG, kind="stable")[:, :TOP], strict=True))

    def shares(named: Mapping[str, str], text: str) -> tuple[float, float]:
        """Return the share of right images among the best and in the gallery."""
        right_G = np.all([has_G[name][value] for name, value in named.items()], axis=0)
        return float(right_G[best_QK[text]].mean()), float(right_G.mean())

    groups: dict[str, dict[str, list[tuple[float, float]]]] = {title: defaultdict(list) for title in TITLES}
    by_count, in_captions, own_words, by_kind = groups.values()
    for sentence, named in sentences.items():
        by_count[str(len(named))].append(shares(named, sentence))
        for name, value in named.items():
            by_kind[name].append(shares({name: value}, sentence))
        if caption := captions.get(sentence):
            own_words[str(len(named))].append(shares(named, sentence))
            in_captions[str(len(named))].append(shares(named, caption))
    return {
        "date": datetime.date.today().isoformat(),
        "version": version_of("tvilfm"),
        "gallery": gallery.num_rows,
        "people": len(set(column(gallery, "pid").tolist())),
        **{title: {key: _row(values) for key, values in sorted(rows.items())} for title, rows in groups.items()},
    }


def _row(values: list[tuple[float, float]]) -> dict[str, float]:
    precision, chance = np.mean(values, axis=0)
    return {"sentences": len(values), "precision": round(float(precision), 3), "chance": round(float(chance), 3)}


def _markdown(record: Mapping[str, Any]) -> str:
    lines = [
        f"`python -m benchmarks.free_sentences`, {record['date']}, tvilfm {record['version']}: one run of the demo, "
        f"{record['gallery']} images of {record['people']} people, text alone.",
    ]
    for title in TITLES:
        lines += ["", f"| {title} | sentences | precision at {TOP} | chance |", "|---|---:|---:|---:|"]
        for key, row in record[title].items():
            lines.append(f"| {key} | {row['sentences']} | {row['precision']:.3f} | {row['chance']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the run, and write and print the table."""
    parser = argparse.ArgumentParser(description="Attribute precision of sentences that no captioner wrote.")
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="folder of the run")
    record = measure(parser.parse_args().run)
    (RESULTS / "free_sentences.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "free_sentences.md").write_text(_markdown(record))
    print(_markdown(record))


if __name__ == "__main__":
    main()
