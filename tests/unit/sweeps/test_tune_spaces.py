"""Search spaces: the shipped ones fit the run description, and what does not fit is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tvilfm.config import load_config
from tvilfm.datasets.readers import published_rows
from tvilfm.sweeps.check import check_space
from tvilfm.sweeps.space import Space, load_space, words, written

CONFIG = Path("ray_config.yaml")
SPACES = sorted(Path("tune_spaces").glob("*.yaml"))
ABLATIONS = Path("tune_spaces/ablations.yaml")


def make_space(tmp_path: Path, **values: Any) -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"description": "a test", **values}))
    return load_space(path)


def searched(parameters: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"searcher": "random", "budget": {"num_samples": 5}, "parameters": parameters, **values}


def test_the_five_spaces_are_there() -> None:
    assert [path.stem for path in SPACES] == ["ablations", "fusion", "losses", "text_source", "text_stage"]


@pytest.mark.parametrize("size", [None, "tiny", "small", "large"])
@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_space_fits_the_run_description(path: Path, size: str | None) -> None:
    space = load_space(path)
    config = check_space(space, CONFIG, ["run.name=x"], size=size)
    assert 1 <= space.scheduler.grace_epochs(config) <= space.scheduler.epochs(config)
    for trial in space.trials(["train.p=4"])[:2]:
        resolved = load_config(CONFIG, trial.overrides, size=size)
        assert (resolved.train.p, resolved.run.seed) == (4, trial.seed)


def test_ablations_are_the_papers_six_rows() -> None:
    # METHOD 9, spelled out again.
    numbers = {
        "sysu_mm01": [72.52, 77.00, 83.97, 84.17, 84.88, 84.90],
        "llcm": [52.63, 54.73, 56.76, 57.13, 57.09, 58.19],
    }
    space = load_space(ABLATIONS)
    for dataset, rank1 in numbers.items():
        rows = {row.method: row for row in reversed(published_rows(dataset))}
        assert [100 * rows[row.published or ""].rank1 for row in space.rows.values()] == pytest.approx(rank1)
    switches = ("loss.filter_text", "loss.joint", "train.text.llm_probability")
    assert [(*(row.overrides[key] for key in switches), row.query) for row in space.rows.values()] == [
        (False, False, 0.0, "fusion"),
        (True, False, 0.0, "fusion"),
        (True, True, 0.0, "fusion"),
        (True, True, 0.5, "fusion"),
        (True, True, 0.0, "ensemble"),
        (True, True, 0.5, "ensemble"),
    ]
    assert space.reference == "all"


def test_rows_that_read_another_query_are_the_same_run() -> None:
    trials = {(trial.setting, trial.seed): trial for trial in load_space(ABLATIONS).trials()}
    assert len(trials) == 18 and len({trial.name for trial in trials.values()}) == 18
    for seed in (0, 1, 2):
        plain, ensemble = trials["B + SFF + MJL", seed], trials["B + SFF + MJL + MER", seed]
        assert plain.overrides == ensemble.overrides and plain.query != ensemble.query
    assert len({trial.overrides for trial in trials.values()}) == 12


def test_a_grid_is_every_combination_under_every_seed(tmp_path: Path) -> None:
    views = {"settings": {"none": {"train.text.cache_views": 0}, "two": {"train.text.cache_views": 2}}}
    space = make_space(tmp_path, seeds=[3, 5], parameters={"loss.joint": [True, False], "views": views})
    check_space(space, CONFIG)
    trials = space.trials()
    assert {(trial.setting, trial.seed) for trial in trials} == {
        (f"joint={joint}, views={views}", seed)
        for joint in ("true", "false")
        for views in ("none", "two")
        for seed in (3, 5)
    }
    assert trials[-1].overrides == ("loss.joint=false", "train.text.cache_views=2", "run.seed=5")


def test_random_settings_are_drawn_once_for_all_seeds_and_stay_in_bounds(tmp_path: Path) -> None:
    parameters = {
        "optim.lr": {"loguniform": [1.0e-4, 1.0e-1]},
        "train.text.llm_probability": {"uniform": [0.25, 0.5]},
        "train.text.cache_views": {"randint": [1, 3]},
        "loss.joint": [True, False],
    }
    space = make_space(tmp_path, **searched(parameters, seeds=[0, 1], budget={"num_samples": 60}))
    settings = space.settings()
    assert settings == space.settings() and len(settings) == 60
    rates = [values["optim.lr"] for values in settings]
    assert 1e-4 <= min(rates) < 1e-3 and 1e-2 < max(rates) <= 1e-1
    assert sum(rate < 10**-2.5 for rate in rates) == pytest.approx(30, abs=12)
    assert all(0.25 <= values["train.text.llm_probability"] <= 0.5 for values in settings)
    assert {values["train.text.cache_views"] for values in settings} == {1, 2, 3}
    by_seed = {seed: [t.setting for t in space.trials() if t.seed == seed] for seed in (0, 1)}
    assert by_seed[0] == by_seed[1] == [words(values) for values in settings]


def test_what_a_search_proposes_becomes_a_trial() -> None:
    space = load_space(Path("tune_spaces/text_stage.yaml"))
    assert space.trials() == []
    values = {key: parameter.tested[0] for key, parameter in space.parameters.items()}
    trial = space.trial(7, values, 0, ["train.p=4"])
    assert trial.name == "0007-seed0" and trial.overrides[0] == "train.p=4"
    config = load_config(CONFIG, trial.overrides)
    assert (config.optim.text_lr, config.train.text.freeze_batch_norm) == (1e-5, False)


def test_overrides_are_read_back_as_they_were() -> None:
    values = {"optim.lr": 1e-05, "evaluate.protocols": ["a/b"] * 30, "data.root": None, "run.name": "off", "train.p": 4}
    read = {key: yaml.safe_load(text) for key, _, text in (one.partition("=") for one in written(values))}
    assert read == values


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"optim.weight_deca": [1.0, 2.0]},
            r"optim\.weight_deca: expected a known key.* Did you mean optim\.weight_decay",
        ),
        (
            {"s": {"settings": {"x": {"loss.joins": True}}}},
            r"loss\.joins: expected a known key.* Did you mean loss\.joint",
        ),
        ({"optim.lr": [1.0e-3, 0.0]}, r"optim\.lr=0: optim\.lr: .*greater than 0, got 0"),
        ({"train.text.llm_probability": {"uniform": [0.5, 1.5]}}, r"train\.text\.llm_probability: .* got 1\.5"),
        ({"train.k": {"randint": [1, 4]}}, r"train\.k: .* got 1"),
        ({"loss.joint": {"uniform": [0.0, 0.5]}}, r"loss\.joint: .*boolean.* got 0\.5"),
        (
            {"train.text.cache_views": [0, 2], "train.text.freeze_batch_norm": [True, False]},
            r"cache_views=2 with train\.text\.freeze_batch_norm=false: train\.text\.cache_views: expected 0",
        ),
        ({"run.seed": [0, 1]}, r"run\.seed: expected a key that affects the results"),
        ({"cluster.train_workers": [1, 2]}, r"cluster\.train_workers: expected a key that affects the results"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_key(
    tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    space = make_space(tmp_path, **searched(parameters))
    with pytest.raises(ValueError, match=message):
        check_space(space, CONFIG)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parameters": {"loss.joint": [True]}, "metrc": "mAP"}, r"metrc: .* Did you mean metric\?"),
        ({"parameters": {"optim.lr": {"unifrm": [1, 2]}}}, r"Did you mean parameters\.optim\.lr\.uniform"),
        ({"rows": {"B": {"overides": {}}}, "reference": "B"}, r"Did you mean rows\.B\.overrides"),
        ({"parameters": {"loss.joint": [True]}, "metric": "rank2"}, r"metric: .*'val_rank1'.* got 'rank2'"),
        (searched({"loss.joint": [True]}, scheduler={"name": "pbt"}), r"scheduler\.name: expected .* got pbt"),
        ({"parameters": {"optim.lr": {"uniform": [1.0, 2.0]}}}, r"parameters\.optim\.lr: expected a list or settings"),
        ({"parameters": {"optim.lr": {"uniform": [2.0, 1.0]}}}, r"optim\.lr\.uniform: expected lowest < highest"),
        ({"parameters": {"optim.lr": {"loguniform": [0.0, 1.0]}}}, r"loguniform: expected 0 < lowest"),
        ({"parameters": {"optim.lr": {"uniform": [1, 2], "randint": [1, 2]}}}, r"optim\.lr\.choices: expected a list"),
        ({}, r"parameters: expected either parameters or rows"),
        ({"rows": {"B": {}}, "reference": "A"}, r"rows: expected searcher grid and a reference among \['B'\]"),
        (searched({"loss.joint": [True]}, searcher="optuna", seeds=[0, 1]), r"seeds: expected one with searcher"),
        (searched({"loss.joint": [True]}, budget={}), r"budget\.num_samples: expected a number with searcher random"),
        (
            searched({"loss.joint": [True]}, scheduler={"name": "asha"}, metric="mAP"),
            r"scheduler\.name: expected none with metric mAP",
        ),
        (searched({"loss.joint": [True]}, seeds=[1, 1]), r"seeds: expected different numbers"),
        (searched({"loss.joint": [True]}, free_steps=9), r"free_steps: expected null with query fusion"),
    ],
)  # fmt: skip
def test_a_space_that_contradicts_itself_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_space(tmp_path, **values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.1"], r"^optim\.lr: expected a key that space does not vary"),
        (["train.text.select=last"], r"^train\.text\.select: expected val with scheduler asha, got last"),
        (["train.text.epochs=0"], r"^space, base: train\.text\.epochs: "),
    ],
)
def test_overrides_that_do_not_go_with_a_space_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    values = searched({"optim.lr": {"uniform": [1.0e-4, 1.0e-3]}}, scheduler={"name": "asha"})
    space = make_space(tmp_path, **values)
    check_space(space, CONFIG)
    with pytest.raises(ValueError, match=message):
        check_space(space, CONFIG, overrides)


def test_trials_of_different_length_are_not_halved_together(tmp_path: Path) -> None:
    space = make_space(tmp_path, **searched({"train.text.epochs": [10, 20]}, scheduler={"name": "asha"}))
    with pytest.raises(ValueError, match=r"^train\.text\.epochs: expected 20 in every trial .* got 10"):
        check_space(space, CONFIG)


@pytest.mark.parametrize(("grace", "epochs", "expected"), [(0.25, 120, 30), (0.25, 3, 1), (0.3, 6, 2), (0.01, 20, 1)])
def test_grace_is_a_share_of_the_stage(tmp_path: Path, grace: float, epochs: int, expected: int) -> None:
    space = make_space(tmp_path, **searched({"loss.joint": [True]}, scheduler={"name": "asha", "grace": grace}))
    assert space.scheduler.grace_epochs(load_config(overrides=[f"train.text.epochs={epochs}"])) == expected


@pytest.mark.parametrize("text", ["- 1\n", "rows: [", None])
def test_a_file_that_is_no_space_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "space.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"space\.yaml|space: expected a YAML file"):
        load_space(path)
