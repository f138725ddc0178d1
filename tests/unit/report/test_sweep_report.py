"""The tables and the page of a sweep: paired statistics, failures with their reasons, four formats that agree."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvilfm.report.sweep import (
    csv_table,
    latex_table,
    markdown_table,
    render_sweep,
    settings_table,
    verdict_sentence,
    write_sweep_report,
)
from tvilfm.sweeps.results import (
    SweepData,
    TrialRecord,
    paired_difference,
    parameter_importance,
    read_trials,
    summarise,
)
from tvilfm.sweeps.space import Parameter, Space, load_space

REASON = 'RuntimeError: bad & worse <b>_100%_</b> in "C:\\x" | end'
LEVELS = {"B": 0.50, "B + SFF": 0.54, "B + SFF + MJL": 0.60, "B + SFF + MJL + LLM": 0.62, "B + SFF + MJL + MER": 0.64}
LEVELS |= {"all": 0.65}


def make_record(name: str, setting: str, seed: int, rank1: float, **changes: Any) -> TrialRecord:
    metrics = {"rank1": rank1, "mAP": rank1 - 0.05, "mINP": rank1 - 0.1, "val_rank1": rank1, "val_mAP": rank1 - 0.03}
    learning = [
        {"stage": stage, "epoch": epoch, "loss": 1.0, "val_mAP": rank1 * (1 - 0.5 ** (epoch + 1))}
        for stage in ("base", "text")
        for epoch in range(3)
    ]
    record = TrialRecord(
        name=name, setting=setting, seed=seed, query="fusion", status="done", metrics=metrics, learning=learning
    )
    return replace(record, **changes)


@pytest.fixture(scope="module")
def ablations() -> SweepData:
    """Three seeds of six rows; one trial failed."""
    space = load_space(Path("tune_spaces/ablations.yaml"))
    luck = np.random.default_rng(0).normal(0, 0.01, (3, 6))
    records = []
    for trial in space.trials():
        place = list(space.rows).index(trial.setting)
        rank1 = LEVELS[trial.setting] + float(luck[trial.seed, place])
        record = make_record(trial.name, trial.setting, trial.seed, rank1, query=trial.query)
        if (trial.setting, trial.seed) == ("B + SFF", 1):
            record = replace(record, status="failed", reason=REASON, metrics={}, learning=record.learning[:4])
        records.append(record)
    return SweepData(space=space, records=records, dataset="synthetic", facts={"note": "<i>"}, config_yaml="a: <b>\n")


@pytest.fixture(scope="module")
def search() -> SweepData:
    """Thirty settings of two parameters of which one decides; a third of the trials was stopped."""
    parameters = {
        "optim.text_lr": Parameter(loguniform=(1e-4, 1e-2)),
        "views": Parameter(settings={"none": {"train.text.cache_views": 0}, "two": {"train.text.cache_views": 2}}),
    }
    space = Space(
        name="toy",
        description="Which rate",
        searcher="optuna",
        budget={"num_samples": 30},  # type: ignore[arg-type]
        parameters=parameters,
    )
    rng, records = np.random.default_rng(0), []
    for number in range(30):
        values = {key: parameter.draw(rng) for key, parameter in parameters.items()}
        trial = space.trial(number, values, 0)
        rank1 = 0.7 + 0.1 * float(np.log10(values["optim.text_lr"])) / 2
        record = make_record(trial.name, trial.setting, 0, rank1, values=values)
        if rank1 < 0.54:
            record = replace(record, status="stopped", metrics={"val_mAP": rank1 - 0.03}, learning=record.learning[:4])
        records.append(record)
    return SweepData(space=space, records=records, dataset="sysu_mm01")


def test_a_difference_is_paired_by_seed_with_students_interval() -> None:
    gap = paired_difference({0: 0.51, 1: 0.63, 2: 0.42, 9: 0.0}, {2: 0.40, 0: 0.50, 1: 0.60, 7: 1.0})
    assert gap is not None and gap.low is not None and gap.high is not None
    # Gaps 0.01, 0.03, 0.02: mean 0.02, deviation 0.01; t of 2 degrees of freedom at 97.5 % is 4.302653 in any table.
    assert gap.mean == pytest.approx(0.02)
    assert gap.high - gap.mean == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert gap.mean - gap.low == pytest.approx(gap.high - gap.mean)


def test_one_seed_has_a_difference_without_an_interval_and_none_has_none() -> None:
    gap = paired_difference({0: 0.5}, {0: 0.4, 1: 0.9})
    assert gap is not None and gap.mean == pytest.approx(0.1) and gap.low is None
    assert paired_difference({0: 0.5}, {1: 0.4}) is None


def test_rows_stand_in_the_papers_order_beside_its_numbers(ablations: SweepData) -> None:
    table = settings_table(ablations)
    assert [row[0] for row in table.rows] == list(LEVELS)
    column = table.header.index("paper: rank-1, mAP, mINP")
    assert table.rows[0][column] == "72.52, 69.15, 55.93" and table.rows[-1][column] == "84.90, 81.47, 70.85"
    assert "SYSU-MM01" in markdown_table(ablations)
    llcm = settings_table(replace(ablations, dataset="llcm"))
    assert llcm.rows[0][column] == "52.63, 58.82, 55.43"


def test_cells_are_means_deviations_and_paired_differences_in_percent(ablations: SweepData) -> None:
    table = settings_table(ablations)
    values = {
        name: {record.seed: 100 * record.metrics["rank1"] for record in ablations.records
               if record.setting == name and record.status == "done"}
        for name in LEVELS
    }  # fmt: skip
    for row in table.rows:
        mine, reference = values[row[0]], values["all"]
        assert row[2] == f"{statistics.fmean(mine.values()):.2f} ± {statistics.stdev(mine.values()):.2f}"
        gap = statistics.fmean(mine[seed] - reference[seed] for seed in mine)
        assert row[5].startswith("" if row[0] == "all" else f"\N{MINUS SIGN}{-gap:.2f} [")
    assert [row[-1].split(";")[0] for row in table.rows] == ["3 done", "2 done", *["3 done"] * 4]


def test_a_failed_trial_is_in_every_table_with_its_reason(ablations: SweepData) -> None:
    assert f"2 done; seed 1 failed: {REASON}".replace("|", "\\|") in markdown_table(ablations)
    assert f"seed 1 failed: {REASON}" in {
        row["not_finished"] for row in csv.DictReader(io.StringIO(csv_table(ablations)))
    }
    assert r"bad \& worse \textless{}b\textgreater{}\_100\%\_\textless{}/b\textgreater{}" in latex_table(ablations)
    page = render_sweep(ablations)
    assert page.count("RuntimeError: bad &amp; worse &lt;b&gt;_100%_&lt;/b&gt;") >= 2 and "<b>" not in page


def test_markdown_and_latex_have_the_same_cells(ablations: SweepData) -> None:
    table = settings_table(ablations)
    markdown = [line for line in markdown_table(ablations).splitlines() if line.startswith("|")]
    assert len(markdown) == 2 + len(table.rows)
    latex = latex_table(ablations)
    body = re.findall(r"^(.*) \\\\$", latex, flags=re.MULTILINE)
    assert [len(re.split(r"(?<!\\)&", line)) for line in body] == [len(table.header)] * (1 + len(table.rows))
    assert re.findall(r"\\(\w+rule)", latex) == ["toprule", "midrule", "bottomrule"]
    assert f"\\begin{{tabular}}{{{'ll' + 'r' * (len(table.header) - 3) + 'l'}}}" in latex


def test_csv_keeps_full_precision(ablations: SweepData) -> None:
    rows = {row["setting"]: row for row in csv.DictReader(io.StringIO(csv_table(ablations)))}
    for one in summarise(ablations):
        row = rows[one.setting]
        assert float(row["rank1_mean"]) == statistics.fmean(one.metrics["rank1"].values())
        if one.setting != "all":
            assert float(row["mAP_difference_low"]) == one.differences["mAP"].low
    assert float(rows["all"]["paper_rank1"]) == pytest.approx(0.849)


def test_the_verdict_tells_real_differences_from_chance(ablations: SweepData) -> None:
    sentence = verdict_sentence(ablations)
    assert re.search(r"lower: B, .*B \+ SFF \+ MJL", sentence)
    same = [replace(r, metrics=dict(r.metrics)) for r in ablations.records if r.setting in ("all", "B")]
    swapped = [
        replace(r, metrics={**r.metrics, "mAP": 0.6 + (0.01 if r.setting == "B" else 0.02) * (-1) ** r.seed})
        for r in same
    ]
    assert "no clear difference: B" in verdict_sentence(replace(ablations, records=swapped))
    one_seed = [record for record in ablations.records if record.seed == 0]
    assert "One seed is not enough to compare" in verdict_sentence(replace(ablations, records=one_seed))
    failed = [replace(record, status="failed", metrics={}) for record in ablations.records]
    assert verdict_sentence(replace(ablations, records=failed)) == "No trial finished."


def test_settings_of_a_search_are_sorted_by_its_metric_and_stopped_ones_come_last(search: SweepData) -> None:
    table = settings_table(search)
    assert table.header[:3] == ["text lr", "views", "validation mAP"]
    finished = [float(row[2]) for row in table.rows if row[2]]
    assert finished == sorted(finished, reverse=True) and 5 < len(finished) < 30
    assert all(row[-1] == "seed 0 stopped" for row in table.rows[len(finished) :])
    assert verdict_sentence(search).startswith(f"Best validation mAP: {finished[0]:.2f} with text_lr=0.00")


def test_importance_finds_the_parameter_that_decides(search: SweepData) -> None:
    shares = parameter_importance(search.space, search.records)
    assert list(shares) == ["optim.text_lr", "views"]
    assert sum(shares.values()) == pytest.approx(1) and shares["optim.text_lr"] > 0.9
    assert parameter_importance(search.space, search.records[:7]) == {}


def test_the_page_has_what_its_sweep_has_and_nothing_from_elsewhere(ablations: SweepData, search: SweepData) -> None:
    of_rows, of_search = render_sweep(ablations), render_sweep(search)
    sections = {"settings", "learning", "all-trials", "config"}
    for page, more in ((of_rows, {"facts"}), (of_search, {"parameters"})):
        ids = re.findall(r'<section id="([^"]+)"', page)
        assert set(ids) == sections | more
        assert set(re.findall(r'href="#([^"]+)"', page.split("</nav>")[0])) <= set(ids)
        assert not re.search(r'(src|href)="(?!#)|@import|<script|<link', page)
    assert 'id="parallel-' in of_search and 'id="importance-' in of_search and 'id="parallel-' not in of_rows
    assert "&lt;i&gt;" in of_rows and "a: &lt;b&gt;" in of_rows


def test_rows_of_one_training_share_a_curve_and_early_ends_are_crossed(ablations: SweepData, search: SweepData) -> None:
    legend = re.findall(r"<text[^>]*>(B[^<]*|all)</text>", render_sweep(ablations).split('id="learning"')[1])
    assert legend == ["B", "B + SFF", "B + SFF + MJL", "B + SFF + MJL + LLM"]
    crosses = render_sweep(search).split('id="learning"')[1].split("</section>")[0].count("<use ")
    plain = replace(search, records=[replace(record, status="done") for record in search.records])
    without = render_sweep(plain).split('id="learning"')[1].split("</section>")[0].count("<use ")
    assert crosses - without == sum(record.status == "stopped" for record in search.records) > 0


def test_a_sweep_of_which_nothing_finished_still_has_a_page(ablations: SweepData) -> None:
    records = [replace(r, status="failed", reason="x", metrics={}, learning=()) for r in ablations.records]
    assert "No trial finished." in render_sweep(replace(ablations, records=records))
    assert "No trial finished." in render_sweep(replace(ablations, records=[]))


def test_records_and_report_are_files(ablations: SweepData, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in ablations.records))
    data = replace(ablations, records=read_trials(path))
    write_sweep_report(data, tmp_path / "report")
    texts = {one.name: one.read_text(encoding="utf-8") for one in (tmp_path / "report").iterdir()}
    assert texts == {
        "table.md": markdown_table(ablations),
        "table.csv": csv_table(ablations),
        "table.tex": latex_table(ablations),
        "index.html": render_sweep(ablations),
    }
