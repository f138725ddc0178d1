"""The result page: honest wording, numbers as in results.json, one self-contained and escaped file."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tvilfm.datasets.readers import published_rows
from tvilfm.evaluation.open_set import OpenSet
from tvilfm.evaluation.results import ResultRow, Results
from tvilfm.place import write_whole
from tvilfm.report import page, tables
from tvilfm.report.charts.features import RetrievalFeatures, distance_chart, pair_distances, tsne_chart
from tvilfm.report.charts.learning import _learning_panels, learning_chart
from tvilfm.report.noise import noise_answer
from tvilfm.report.page import CaptionSample, RankedExample, RankedRow, ReportData
from tvilfm.terms import METRICS, QUERIES

NUM_IDS = 16
DIM = 100
PROTOCOL = "synthetic/all/single"
HOSTILE = 'a man <script>alert(1)</script> & "co" in a red coat'
IMAGE_NUMBERS = itertools.count()
SPREAD = {"infrared": 1.1, "text": 0.95, "fusion": 0.62, "ensemble": 0.55}


def make_row(
    query: str, rank1: float, *, source: str | None = None, protocol: str = PROTOCOL, **changes: Any
) -> ResultRow:
    values = {
        "query": query,
        "text_source": source or ("none" if query == "infrared" else "witness"),
        "protocol": protocol,
        "rank1": rank1,
        "rank5": min(1.0, rank1 + 0.131),
        "rank10": min(1.0, rank1 + 0.172),
        "mAP": 0.93 * rank1,
        "mINP": 0.81 * rank1,
        "std": dict.fromkeys(METRICS, 0.0123),
        "num_trials": 10,
    }
    return ResultRow(**(values | changes))


def make_results(
    infrared: float = 0.4127, fusion: float = 0.6893, ensemble: float = 0.7311, dataset: str = "synthetic"
) -> Results:
    ranks = {"infrared": infrared, "text": 0.551, "fusion": fusion, "ensemble": ensemble}
    rows = [make_row(query, rank1) for query, rank1 in ranks.items()]
    for source, scale in (("witness-heldout", 0.92), ("own", 0.61)):
        rows += [make_row(query, scale * ranks[query], source=source) for query in ("text", "fusion", "ensemble")]
    for query, rank1 in ranks.items():
        rows.append(make_row(query, 0.97 * rank1, protocol="synthetic/indoor/single"))
    return Results(
        dataset=dataset,
        default_text_source="witness",
        default_protocol=PROTOCOL,
        chance={PROTOCOL: 1 / NUM_IDS, "synthetic/indoor/single": 1 / NUM_IDS},
        rows=rows,
        open_set={
            name: OpenSet(
                thresholds=(0.1, 0.5, 0.9),
                false_accepts=(1.0, 0.4, 0.0),
                false_rejects=(0.0, 0.3, 1.0),
                gallery_people=96.0,
                fitted=None if name == "text" else 0.7321,
                fitted_false_accepts=None if name == "text" else 0.1234,
                fitted_false_rejects=None if name == "text" else 0.5678,
            )
            for name in ("infrared", "text", "ensemble")
        },
        text_noise={
            noise: [make_row(query, scale * ranks[query]) for query in ("text", "fusion", "ensemble")]
            for noise, scale in (("typos-1", 0.9), ("typos-2", 0.5), ("typos-4", 0.4), ("chatter", 0.8))
        },
    )


def infrared_only() -> Results:
    return Results(
        dataset="synthetic",
        default_text_source="witness",
        default_protocol=PROTOCOL,
        chance={PROTOCOL: 0.0625},
        rows=[make_row("infrared", 0.4127)],
    )


def make_features(query: str, *, images: int = 8) -> RetrievalFeatures:
    """Clusters around identity centres; the query modality shifts and blurs them."""
    generator = np.random.default_rng(QUERIES.index(query))
    centres = np.random.default_rng(99).normal(size=(NUM_IDS, DIM))
    pids = np.repeat(np.arange(NUM_IDS), images)
    offset = 0.5 * SPREAD[query] * np.random.default_rng(7).normal(size=DIM)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    queries = unit(centres[pids] + offset + SPREAD[query] * generator.normal(size=(len(pids), DIM)))
    gallery = unit(centres[pids] + 0.5 * np.random.default_rng(5).normal(size=(len(pids), DIM)))
    return RetrievalFeatures(queries, pids, gallery, pids)


def make_image(pid: int, *, infrared: bool = False, height: int = 96) -> np.ndarray:
    """A pedestrian of a few rectangles and an ellipse; the person decides the clothes."""
    generator = np.random.default_rng(pid)
    noise = np.random.default_rng(next(IMAGE_NUMBERS))
    upper, lower = generator.integers(30, 230, size=(2, 3))
    width = height // 2
    y, x = np.mgrid[0:height, 0:width] / height
    image = np.empty((height, width, 3))
    image[:] = noise.integers(120, 200, size=3) + 30 * (y - 0.5)[..., None]
    middle = 0.25 + noise.uniform(-0.02, 0.02)
    image[(y > 0.24) & (y < 0.56) & (abs(x - middle) < 0.11)] = upper
    image[(y >= 0.54) & (y < 0.92) & (abs(abs(x - middle) - 0.05) < 0.042)] = lower
    image[((x - middle) / 0.055) ** 2 + ((y - 0.15) / 0.075) ** 2 < 1] = (205, 165, 140)
    image += noise.normal(scale=7, size=image.shape)
    if infrared:
        image[:] = 0.6 * image.mean(axis=2, keepdims=True) + 40
    return np.clip(image, 0, 255).astype(np.uint8)


def make_example(
    pid: int, *, text: str = "a woman in a green jacket and dark trousers with a shoulder bag"
) -> RankedExample:
    generator = np.random.default_rng(pid)
    rankings = {}
    for query, hit_rate in zip(("infrared", "text", "fusion", "ensemble"), (0.3, 0.4, 0.6, 0.7), strict=True):
        correct = (generator.uniform(size=10) < hit_rate * np.linspace(1.3, 0.5, 10)).tolist()
        found = [pid if hit else int(generator.integers(100, 200)) for hit in correct]
        rankings[query] = RankedRow(
            images=[make_image(one) for one in found],
            correct=correct,
            similarity=sorted(generator.uniform(0.3, 0.8, size=10).tolist(), reverse=True),
        )
    return RankedExample(
        image=make_image(pid, infrared=True),
        person=str(pid),
        query_text=text,
        filter_text="a person in a jacket and trousers carrying a bag",
        rankings=rankings,
    )


def make_learning() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for stage, epochs in (("base", 24), ("ifs", 12)):
        for epoch in range(epochs):
            fall = np.exp(-epoch / 6)
            records.append({"stage": stage, "epoch": epoch, "loss": 0.6 + 5 * fall, "loss_id": 0.4 + 3.4 * fall})
            records[-1] |= {"loss_wrt": 0.2 + 1.6 * fall, "lr": 3.5e-4, "epoch_s": 4.2}
            if epoch % 2 == 1:
                records.append(
                    {
                        "stage": stage,
                        "epoch": epoch,
                        "val_rank1": 0.8 * (1 - fall),
                        "val_mAP": 0.7 * (1 - fall),
                    }
                )
    return records


def make_data(results: Results | None = None) -> ReportData:
    results = results or make_results()
    captions = (
        "a man wearing a black t-shirt and grey shorts",
        "a person in a long coat holding an umbrella",
    )
    return ReportData(
        results=results,
        name="demo",
        cmc={row.query: 1 - (1 - row.rank1) * np.exp(-np.arange(20) / 5) for row in results.default_rows},
        examples=[make_example(3, text=HOSTILE), make_example(4)],
        features={row.query: make_features(row.query) for row in results.default_rows},
        learning=make_learning(),
        captions=[
            CaptionSample(make_image(1), "visible", captions[0], "a man dressed in a black tee and grey shorts"),
            CaptionSample(make_image(1, infrared=True), "infrared", captions[1]),
            CaptionSample(make_image(2), "visible", HOSTILE, HOSTILE),
        ],
        facts={
            "dataset": "synthetic, 48 training and 16 test identities",
            "seed": "0",
            "fingerprint": "3f2a" * 16,
        },
        config_yaml="train:\n  epochs: 24  # <b>not bold</b>\n",
        notes=["The checkpoint was selected on the test set."],
    )


class PageReader(HTMLParser):
    """Collects ids, visible text and addresses, and checks that every element is closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.text = ""
        self.json = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]
        if tag == "script":
            self.scripts.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.json += data
        elif self.open and self.open[-1] != "style":
            self.text += data


def read_page(html: str) -> PageReader:
    reader = PageReader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


OPTIONAL_SECTIONS = (
    *("protocols", "noise", "open-set-search", "ranked", "tsne", "distances"),
    *("captions", "learning", "facts"),
)


@pytest.fixture(scope="module")
def full_page() -> str:
    return page.render_report(make_data())


def test_page_has_every_section_in_order(full_page: str) -> None:
    reader = read_page(full_page)
    expected = ["verdict", "results", "comparison", "cmc", *OPTIONAL_SECTIONS, "config"]
    assert [name for name in reader.ids if name in expected] == expected
    assert len(reader.ids) == len(set(reader.ids))


def test_page_is_self_contained(full_page: str) -> None:
    reader = read_page(full_page)
    assert reader.addresses
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    local = {address[1:] for address in reader.addresses if address.startswith("#")}
    local |= set(re.findall(r"url\(#([^)]+)\)", full_page))
    assert local <= set(reader.ids)
    assert not re.search(r"url\((?!#)|@import|<link", full_page)


def test_page_shows_the_numbers_of_results_json(full_page: str) -> None:
    results = make_results()
    reader = read_page(full_page)
    assert Results.from_dict(json.loads(reader.json)) == results
    for row in results.rows:
        for metric in METRICS:
            assert f"{100 * getattr(row, metric):.2f} ± 1.23" in reader.text
    for row in itertools.chain(*results.text_noise.values()):
        assert reader.text.count(f"{100 * row.mAP:.2f} ± 1.23") >= 2  # in a table, and as Markdown


def test_page_shows_the_errors_of_the_fitted_scores(full_page: str) -> None:
    text = " ".join(read_page(full_page).text.split())
    assert text.count("0.73212.3456.78") == 2 and "galleries of 96 people" in text
    unfitted = {"text": make_results().open_set["text"]}
    text = read_page(page.render_report(ReportData(results=replace(make_results(), open_set=unfitted)))).text
    assert "no threshold was fitted" in text and "fitted score" not in text


def test_page_escapes_texts(full_page: str) -> None:
    reader = read_page(full_page)
    assert [script.get("type") for script in reader.scripts] == ["application/json"]
    assert "<b>not bold" not in full_page
    assert reader.text.count(HOSTILE) == 3


def test_page_shows_notes_and_text_source_meaning(full_page: str) -> None:
    text = read_page(full_page).text
    assert "The checkpoint was selected on the test set." in text
    assert "what a witness description adds" in text
    assert "expected rank-1 of 6.25%" in text


def test_marks_do_not_rely_on_colour_alone(full_page: str) -> None:
    hits = sum(sum(row.correct) for example in make_data().examples for row in example.rankings.values())
    assert len(re.findall(r'<li class="right"><img [^>]*right person"><b>✓</b>', full_page)) == hits
    assert len(re.findall(r'<li class="wrong"><img [^>]*wrong person"><b>✗</b>', full_page)) == 80 - hits


def test_minimal_page_has_no_empty_sections() -> None:
    reader = read_page(page.render_report(ReportData(results=infrared_only())))
    assert {"verdict", "results", "config"} <= set(reader.ids)
    assert not {"cmc", *OPTIONAL_SECTIONS} & set(reader.ids)


def test_infrared_only_page_with_all_parts() -> None:
    data = make_data(infrared_only())
    query = "infrared"
    examples = [
        replace(one, query_text=None, filter_text=None, rankings={query: one.rankings[query]}) for one in data.examples
    ]
    reader = read_page(page.render_report(replace(data, examples=examples)))
    assert {"ranked", "tsne", "distances"} <= set(reader.ids)
    assert "Query text “none”" in reader.text
    assert "Filter text" not in reader.text


def test_write_report_is_atomic_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "demo" / "report" / "index.html"
    data = ReportData(results=infrared_only())
    page.write_report(data, path)
    page.write_report(data, path)
    assert [one.name for one in path.parent.iterdir()] == ["index.html"]
    assert path.read_text(encoding="utf-8") == page.render_report(data)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tvilfm.place.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]


def test_page_rejects_an_unknown_query() -> None:
    with pytest.raises(ValueError, match=r"report\.cmc: expected keys among"):
        page.render_report(ReportData(results=infrared_only(), cmc={"thermal": np.ones(20)}))


def test_ranked_row_rejects_uneven_lengths() -> None:
    with pytest.raises(ValueError, match="ranked_row: expected as many images"):
        RankedRow(images=[make_image(0)], correct=[True, False], similarity=[0.5])


def test_verdict_holds() -> None:
    found = tables.verdict(make_results(0.4127, 0.6893, 0.7311))
    assert found.outcome == "holds"
    for words in ("41.27%", "68.93%", "73.11%", "Chance is 6.25%", "never seen in training"):
        assert words in found.sentence


def test_verdict_names_the_text_source() -> None:
    assert "when a witness description is fused in" in tables.verdict(make_results()).sentence
    own = replace(make_results(), default_text_source="own", text_noise={})
    assert "when the image's own caption is fused in" in tables.verdict(own).sentence


@pytest.mark.parametrize(("fusion", "word"), [(0.4127, "no change"), (0.40, "lower than infrared")])
def test_verdict_does_not_hold_when_fusion_is_not_above_infrared(fusion: float, word: str) -> None:
    found = tables.verdict(make_results(0.4127, fusion, 0.7311))
    assert found.outcome == "fails"
    assert "does not hold" in found.sentence
    assert f"fused in ({word}), and to 73.11% with the ensemble (higher than fusion)" in found.sentence
    assert "rises" not in found.sentence


@pytest.mark.parametrize(("ensemble", "word"), [(0.6893, "no change"), (0.66, "lower than fusion")])
def test_verdict_is_partial_when_ensemble_is_not_above_fusion(ensemble: float, word: str) -> None:
    found = tables.verdict(make_results(0.4127, 0.6893, ensemble))
    assert found.outcome == "partly"
    assert "only in part" in found.sentence
    assert f"fused in (higher than infrared), and to {100 * ensemble:.2f}% with the ensemble ({word})" in found.sentence
    assert "rises" not in found.sentence


def test_verdict_says_when_mAP_disagrees() -> None:
    rows = [make_row("infrared", 0.4), make_row("fusion", 0.5, mAP=0.3), make_row("ensemble", 0.6, mAP=0.35)]
    found = tables.verdict(replace(make_results(), rows=rows))
    assert found.outcome == "partly"
    words = "mAP changes differently: 37.20% with infrared alone, 30.00% with infrared + text (fusion) (lower)."
    assert found.sentence.count("mAP") == 1
    assert words in found.sentence


def test_verdict_says_when_a_step_is_within_the_spread() -> None:
    assert "smaller than the standard deviation" not in tables.verdict(make_results()).sentence
    assert "smaller than the standard deviation" in tables.verdict(make_results(ensemble=0.6993)).sentence


def test_verdict_says_when_text_alone_does_as_well() -> None:
    assert "text alone already reaches" not in tables.verdict(make_results()).sentence
    assert "text alone already reaches 55.10%" in tables.verdict(make_results(0.2, 0.5, 0.6)).sentence


def test_verdict_compares_with_chance() -> None:
    results = make_results(0.2, 0.5, 0.6)  # text alone at 55.1 %
    at = {share: replace(results, chance={results.default_protocol: share}) for share in (0.2, 0.551, 0.7)}
    assert "may carry the result by itself" in tables.verdict(at[0.2]).sentence
    told = tables.verdict(at[0.551])
    assert told.outcome == "holds" and "The text alone reaches 55.10%, which is no better than chance." in told.sentence
    nothing = tables.verdict(at[0.7])
    assert nothing.outcome == "incomplete" and nothing.sentence.startswith("No query is better than chance")
    assert "holds in this run" not in nothing.sentence and "carry" not in nothing.sentence
    # Above chance, but by less than the standard deviation over trials.
    rows = [replace(row, std={**row.std, "rank1": 0.2}) for row in results.rows]
    within = tables.verdict(replace(results, rows=rows, chance={results.default_protocol: 0.45}))
    assert within.outcome == "incomplete" and "text alone already" not in within.sentence


def test_verdict_of_infrared_only_claims_nothing_about_text() -> None:
    found = tables.verdict(infrared_only())
    assert found.outcome == "incomplete"
    assert "says nothing about text" in found.sentence
    assert "41.27%" in found.sentence


def test_verdict_without_ensemble_or_infrared_is_incomplete() -> None:
    rows = {row.query: row for row in make_results().default_rows}
    no_ensemble = tables.verdict(replace(make_results(), rows=[rows["infrared"], rows["fusion"]]))
    assert (no_ensemble.outcome, "was not evaluated" in no_ensemble.sentence) == ("incomplete", True)
    no_infrared = tables.verdict(replace(make_results(), rows=[rows["text"], rows["fusion"]]))
    assert "without numbers for infrared alone and ensemble (MER)" in no_infrared.sentence


def test_default_rows_take_the_default_text_source() -> None:
    results = replace(make_results(), default_text_source="own", text_noise={})
    assert [row.text_source for row in results.default_rows] == ["none", "own", "own", "own"]
    assert [row.query for row in results.default_rows] == ["infrared", "text", "fusion", "ensemble"]
    assert "No ground truth is used" in tables.text_source_sentence(results)


def test_results_json_round_trip(tmp_path: Path) -> None:
    results = make_results()
    odd = make_row("infrared", 1 / 3, protocol="odd", mAP=np.float32(0.1), num_trials=np.int64(1))
    results = replace(results, rows=[*results.rows, odd])
    path = tmp_path / "run" / "results.json"
    results.write(path)
    data = json.loads(path.read_text())
    keys = {"default_text_source", "default_protocol", "dataset", "chance", "rows", "open_set", "text_noise"}
    assert set(data) == keys
    assert data["rows"][0]["rank1"] == 0.4127
    assert Results.read(path) == results
    assert [one.name for one in path.parent.iterdir()] == ["results.json"]
    del data["text_noise"], data["open_set"]  # as an earlier version wrote it
    assert Results.from_dict(data) == replace(results, text_noise={}, open_set={})


def test_the_answer_names_the_level_from_which_infrared_alone_is_better() -> None:
    answer = noise_answer(make_results())  # infrared 0.4127, ensemble 0.7311 without noise
    assert answer is not None
    assert "better than the ensemble from these points on: 2 typing errors (36.55%)." in answer
    assert answer.endswith("with all other noise, at its worst small talk around it (58.49%).")
    level = {"typos-2": make_results(ensemble=0.9).text_noise["typos-2"]}  # 4 typing errors are worse, but not these
    mixed = noise_answer(replace(make_results(), text_noise={**make_results().text_noise, **level}))
    assert mixed is not None and "from these points on: 4 typing errors (29.24%)." in mixed
    good = noise_answer(replace(make_results(), text_noise={"named-2": make_results().text_noise["typos-1"]}))
    assert good is not None and good.endswith("The ensemble is at least as good with every noise that was evaluated.")
    fewer = {"clauses-1": make_results().text_noise["typos-4"], "clauses-3": make_results().text_noise["typos-2"]}
    short = noise_answer(replace(make_results(), text_noise=fewer))
    assert short is not None and "from these points on: only 3 clauses (36.55%)." in short
    assert noise_answer(infrared_only()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": "thermal"}, "row.query: expected one of"),
        ({"text_source": "oracle"}, "row.text_source: expected one of"),
        ({"rank1": 84.9}, "row.rank1: expected a fraction in 0-1, got 84.9"),
        ({"mAP": float("nan")}, "row.mAP: expected a fraction"),
        ({"num_trials": 0}, "row.num_trials: expected >= 1"),
        ({"std": {"rank1": 0.1}}, "row.std: expected the keys"),
    ],
)
def test_row_rejects_what_it_cannot_mean(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ResultRow.from_dict(make_row("infrared", 0.4).to_dict() | changes)


def test_results_reject_missing_default_and_repeated_rows(tmp_path: Path) -> None:
    row = make_row("infrared", 0.4)
    with pytest.raises(ValueError, match=r"results\.default_protocol: expected one of"):
        replace(infrared_only(), default_protocol="elsewhere")
    with pytest.raises(ValueError, match="one row per"):
        replace(infrared_only(), rows=[row, row])
    with pytest.raises(ValueError, match=r"results\.text_noise\['typos-1'\]: expected rows of"):
        replace(infrared_only(), text_noise={"typos-1": [make_row("text", 0.4, source="own")]})
    with pytest.raises(ValueError, match="at least one row"):
        replace(infrared_only(), rows=[])
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        Results.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="results: expected the keys"):
        Results.read(path)


@pytest.mark.parametrize("dataset", ["sysu_mm01", "regdb", "llcm"])
def test_published_rows_stand_beside_real_datasets(dataset: str) -> None:
    rows = published_rows(dataset)
    assert {"infrared", "ensemble"} <= {row.query for row in rows}
    assert all(0 < row.rank1 < 1 for row in rows)
    text = read_page(page.render_report(ReportData(results=replace(infrared_only(), dataset=dataset)))).text
    assert "Comparison with published results" in text
    assert "published, single run, test-selected" in text


def test_published_numbers_of_the_full_method() -> None:
    """METHOD section 9, last row of the table."""
    full = {name: published_rows(name) for name in ("sysu_mm01", "llcm")}
    found = {
        name: [100 * value for value in (row.rank1, row.mAP, row.mINP) if value is not None]
        for name, rows in full.items()
        for row in reversed(rows)
        if row.method == "TVI-LFM, all parts"
    }
    assert found["sysu_mm01"] == pytest.approx([84.90, 81.47, 70.85])
    assert found["llcm"] == pytest.approx([58.19, 65.08, 61.83])


def test_published_rows_are_absent_for_synthetic(full_page: str) -> None:
    assert published_rows("synthetic") == ()
    assert "Comparison with published results" not in full_page


def test_tables_print_the_same_figures() -> None:
    results = make_results()
    console = Console(file=io.StringIO(), width=80)
    console.print(tables.terminal_table(results))
    assert isinstance(console.file, io.StringIO)
    terminal, markdown = console.file.getvalue(), tables.markdown_table(results)
    assert "…" not in terminal
    for row in results.default_rows:
        for metric in METRICS:
            cell = tables.metric_cell(row, metric)
            assert cell == f"{100 * row.metric(metric):.2f} ± {100 * row.std[metric]:.2f}"
            assert all(part in terminal for part in cell.split(" ± "))
            assert cell in markdown
    flowing = " ".join(terminal.split())
    for words in ("rank-1 of 6.25%", "a witness description adds", "The paper's claim holds"):
        assert words in flowing
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 2 + len(results.rows) + 12


def test_single_trial_prints_no_spread() -> None:
    assert tables.metric_cell(make_row("infrared", 0.4, num_trials=1), "rank1") == "40.00"
    assert tables.spread_sentence([make_row("infrared", 0.4, num_trials=1)]).startswith("One trial")


def test_pair_distances_match_plain_loops() -> None:
    features = make_features("fusion", images=2)
    same, different = pair_distances(features)
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for query, query_pid in zip(features.query_QD, features.query_pids, strict=True):
        for gallery, gallery_pid in zip(features.gallery_GD, features.gallery_pids, strict=True):
            pairs[bool(query_pid == gallery_pid)].append(
                1 - sum(float(a) * float(b) for a, b in zip(query, gallery, strict=True))
            )
    assert sorted(same.tolist()) == pytest.approx(sorted(pairs[True]), abs=1e-6)
    assert sorted(different.tolist()) == pytest.approx(sorted(pairs[False]), abs=1e-6)


def test_pair_distances_take_part_of_the_queries_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_features("fusion")
    monkeypatch.setattr("tvilfm.report.charts.features.DISTANCE_PAIRS", 10 * len(features.gallery_pids))
    same, different = pair_distances(features)
    assert len(same) + len(different) == 10 * len(features.gallery_pids)


def test_charts_are_reproducible_and_leave_out_what_cannot_be_drawn() -> None:
    features = {"fusion": make_features("fusion", images=2)}
    assert tsne_chart(features, seed=1) == tsne_chart(features, seed=1)
    query_QD, query_pids, gallery_GD, gallery_pids = features["fusion"]
    strangers = {"fusion": RetrievalFeatures(query_QD, query_pids, gallery_GD, gallery_pids + 1000)}
    assert tsne_chart(strangers) is None
    assert distance_chart(strangers) is None
    tiny = {"fusion": RetrievalFeatures(query_QD[:2], query_pids[:2], gallery_GD[:2], gallery_pids[:2])}
    assert tsne_chart(tiny) is None
    assert tsne_chart({}) is None
    assert learning_chart([]) is None
    assert learning_chart([{"stage": "base", "epoch": 0, "lr": 0.1, "loss": float("nan")}]) is None


def test_many_points_become_one_bitmap(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"fusion": make_features("fusion", images=3)}
    vector = tsne_chart(features)
    monkeypatch.setattr("tvilfm.report.charts.features.VECTOR_POINTS", 10)
    bitmap = tsne_chart(features)
    assert vector is not None and bitmap is not None
    assert "<image" not in vector
    assert "data:image/png;base64" in bitmap


def test_learning_records_of_one_epoch_are_merged() -> None:
    records = [
        {"stage": "base", "epoch": 0, "loss": 3.0},
        {"stage": "base", "epoch": 0, "loss": 2.0, "val_rank1": 0.25, "lr": 1e-4, "val_loss": 9.0},
        {"stage": "ifs", "epoch": 0, "wrt_text": 1.0},
    ]
    panels = _learning_panels(records)
    assert panels == [
        ("base: loss", {"loss": {0: 2.0}}, False),
        ("base: validation (%)", {"rank-1": {0: 0.25}}, True),
        ("ifs: loss", {"wrt_text": {0: 1.0}}, False),
    ]


def test_report_imports_neither_pyplot_nor_ray_and_tables_no_matplotlib() -> None:
    code = (
        "import sys; import tvilfm.report.tables; assert 'matplotlib' not in sys.modules;"
        "import tvilfm.report.page; assert not {'matplotlib.pyplot', 'ray', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
