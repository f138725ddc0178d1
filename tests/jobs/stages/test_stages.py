"""Which stages a changed key touches, and what a killed stage leaves behind."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.cli.app import app as main
from cluster.stages.registry import STAGES, stage_fingerprints, stages_of
from cluster.stages.stage import PLACEMENT, StageJob, UndeclaredInputError, UndeclaredKeyError, covers, view_of
from cluster.stages.store import STATE, StageStore
from tvilfm.config import FIDELITY_SWITCHES, Config, TextStageSection, known_keys, load_config

SOURCES = {"dataset": "d0", "caption_files": "c0", "attributes": "a0", "model": "m0"}
REPORT_ONLY = ("run.name", "data.split", "data.synthetic", "fidelity")  # what a dataset is decides its fingerprint


def _load(*overrides: str) -> Config:
    return load_config(Path("ray_config.yaml"), ["caption.source=files", *overrides], size="tiny")


def _changed(before: Config, after: Config, sources: dict[str, str] = SOURCES) -> set[str]:
    old, new = stage_fingerprints(before, SOURCES), stage_fingerprints(after, sources)
    return {name for name in STAGES if old.get(name) != new.get(name)}


AFTER_TEXT = {"text", "features", "results", "report"}
CASES = {
    "evaluate.ensemble.text=2": {"results", "report"},
    "evaluate.text_sources=[witness]": {"features", "results", "report"},
    "evaluate.text_noise=[typos-1]": {"features", "results", "report"},
    "loss.joint=false": AFTER_TEXT,
    "optim.text_lr=0.002": AFTER_TEXT,
    "train.text.llm_probability=0": AFTER_TEXT,
    "train.text.cache_views=3": {"views"} | AFTER_TEXT,
    "train.base.epochs=7": {"base", "views"} | AFTER_TEXT,
    "loss.wrt_weight=0.5": {"base", "views"} | AFTER_TEXT,
    "loss.center_weight=0.5": {"base", "views"} | AFTER_TEXT,
    "evaluate.rerank.method=k_reciprocal": {"results", "report"},
    "train.pretrain.steps=9": {"pretrain", "base", "views"} | AFTER_TEXT,
    "data.height=64": {"pixels", "pretrain", "base", "views"} | AFTER_TEXT,
    "cluster.extract_workers=1": set(),
    "run.name=other": {"report"},
    "evaluate.batch=7": set(),
    "data.root=elsewhere": set(),
    "caption.train.epochs=9": {"report"},  # captions come from files
}


@pytest.mark.parametrize("override", CASES)
def test_a_changed_key_changes_exactly_the_stages_that_depend_on_it(override: str) -> None:
    assert _changed(_load(), _load(override)) == CASES[override]


UNCACHED = "train.text.cache_views=0"
# The paper's own recipe caches no views: the text stage has to know the base model all the same.
UNCACHED_CASES = {
    "model.backbone=resnet50": {"pretrain", "base"} | AFTER_TEXT,
    "train.base.epochs=7": {"base"} | AFTER_TEXT,
    "data.height=64": {"pixels", "pretrain", "base"} | AFTER_TEXT,
    "model.text.layers=2": AFTER_TEXT,
}


@pytest.mark.parametrize("override", UNCACHED_CASES)
def test_without_cached_views_the_text_stage_follows_the_base_stage(override: str) -> None:
    assert _changed(_load(UNCACHED), _load(UNCACHED, override)) == UNCACHED_CASES[override]


def _other(value: object) -> object:
    """Return a value of the same kind that is not this one; what validation would say does not matter here."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return (*value, "other") if isinstance(value, tuple) else f"{value}-other"


def _with(section: BaseModel, key: str) -> BaseModel:
    name, _, rest = key.partition(".")
    value = getattr(section, name)
    return section.model_copy(update={name: _with(value, rest) if rest else _other(value)})


def _descendants(config: Config, names: set[str]) -> set[str]:
    for name in stages_of(config):
        if names.intersection(STAGES[name].inputs(config)):
            names = names | {name}
    return names


RECIPES = [
    (size, f"fidelity={fidelity}", f"train.text.cache_views={views}", f"caption.source={source}")
    for size in (None, "small", "tiny")
    for fidelity, views in (("corrected", 0), ("corrected", 2), ("published", 0))
    for source in ("files", "captioner", "finetuned")
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydantic, of values that no validation saw
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_each_key_renames_exactly_the_stages_that_declare_it_and_their_descendants(
    recipe: tuple[str | None, ...],
) -> None:
    size, *overrides = recipe
    config = load_config(Path("ray_config.yaml"), [str(one) for one in overrides], size=size)
    for key in known_keys():
        changed = _with(config, key)
        assert isinstance(changed, Config)
        both = set(stages_of(config)) | set(stages_of(changed))
        declaring = {name for name in both if not covers(PLACEMENT, key) and covers(STAGES[name].keys, key)}
        appeared = set(stages_of(config)) ^ set(stages_of(changed))
        expected = _descendants(config, declaring | appeared) | _descendants(changed, declaring | appeared)
        assert _changed(config, changed) == expected, key


def test_a_trained_model_takes_the_place_of_training_and_its_content_names_what_builds_on_it() -> None:
    given = _load("model.trained=runs/demo")
    assert stages_of(given) == ["pixels", "trained", "features", "results", "report"]
    assert _changed(given, _load("model.trained=/moved/demo")) == set()
    assert _changed(given, given, {**SOURCES, "model": "m1"}) == {"trained", "features", "results", "report"}
    assert _changed(given, _load("model.trained=runs/demo", "train.base.epochs=9")) == {"report"}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_stages_read_earlier_stages_alone(recipe: tuple[str | None, ...]) -> None:
    size, *overrides = recipe
    config = load_config(Path("ray_config.yaml"), [str(one) for one in overrides], size=size)
    finished = set(SOURCES)
    for name in stages_of(config):
        assert set(STAGES[name].inputs(config)) <= finished, name
        finished.add(name)


def test_a_stage_reads_the_keys_that_it_declares_and_no_other() -> None:
    view = pickle.loads(pickle.dumps(view_of(_load(), "text", STAGES["text"].keys)))
    assert isinstance(view.train.text, TextStageSection) and view.train.p == 4
    assert view.cluster.train_workers == 1  # where it works decides no result
    for read in (lambda: view.train.base.epochs, lambda: view.model.backbone, lambda: view.run.name):
        with pytest.raises(UndeclaredKeyError, match="stage text"):
            read()
    assert view_of(_load(), "any", ("run.name",)).run.path.name == "tiny"
    with pytest.raises(UndeclaredKeyError, match=r"run\.name"):
        _ = view.run.path  # derived from a key that is not declared


def test_a_stage_reads_the_inputs_that_it_declares_and_no_other(tmp_path: Path) -> None:
    job = StageJob(
        stage="text",
        config=_load(),
        data_root=tmp_path,
        stages_root=tmp_path,
        depot=None,
        lock=lambda name: nullcontext(),
        folders={"base": tmp_path / "base"},
        tables={},
        fingerprints={},
    )
    assert job.input("base") == tmp_path / "base" and job.has("base") and not job.has("views")
    for read in (lambda: job.input("pixels"), lambda: job.manifest, lambda: job.captions, lambda: job.caption_files):
        with pytest.raises(UndeclaredInputError, match="stage text"):
            read()


def test_new_captions_redo_the_text_stage_and_leave_the_base_model() -> None:
    config = _load()
    assert _changed(config, config, {**SOURCES, "caption_files": "c1"}) == AFTER_TEXT
    assert _changed(config, config, {**SOURCES, "dataset": "d1"}) == set(stages_of(config)) - {"pretrain"}


def test_sentences_of_people_decide_the_features_of_runs_that_use_them() -> None:
    config = _load("data.human_texts=/words.json")
    used = _load("data.human_texts=/words.json", "evaluate.text_sources=[witness,human]")
    after = {"features", "results", "report"}
    old, new = (stage_fingerprints(used, {**SOURCES, "human_texts": text}) for text in ("h0", "h1"))
    assert {name for name in old if old[name] != new[name]} == after
    assert _changed(config, config, {**SOURCES, "human_texts": "h1"}) == set()


def test_true_attributes_decide_the_features_of_runs_that_use_them() -> None:
    config, used = _load("evaluate.text_noise=[typos-1]"), _load("evaluate.text_noise=[wrong-1]")
    old, new = (stage_fingerprints(used, {**SOURCES, "attributes": truth}) for truth in ("a0", "a1"))
    assert {name for name in old if old[name] != new[name]} == {"features", "results", "report"}
    assert _changed(config, config, {**SOURCES, "attributes": "a1"}) == set()


def test_captions_that_the_run_writes_decide_what_builds_on_them_and_those_of_files_nothing_else() -> None:
    finetuned = _load("caption.source=finetuned")

    def changed(override: str) -> set[str]:
        return _changed(finetuned, _load("caption.source=finetuned", override))

    assert changed("caption.infrared.beams=2") == {"captioner_infrared", "captions"} | AFTER_TEXT
    assert changed("caption.train.epochs=9") == {"captioner_visible", "captioner_infrared", "captions"} | AFTER_TEXT
    assert changed("caption.rephrase.max_words=9") == {"captions"} | AFTER_TEXT
    assert changed("run.seed=1").isdisjoint({"captioner_visible", "captioner_infrared", "captions"})
    assert _changed(finetuned, finetuned, {**SOURCES, "caption_files": "c1"}) == changed("caption.train.epochs=9")
    written = _load("caption.source=captioner")
    assert stages_of(written)[:3] == ["pixels", "captions", "pretrain"]
    assert stage_fingerprints(written, {"dataset": "d0"}).keys() == set(stages_of(written))


def test_every_key_decides_a_stage_or_is_listed_as_without_influence() -> None:
    decides = tuple(key for name, stage in STAGES.items() if name != "report" for key in stage.keys)
    for key in known_keys():
        places = [covers(keys, key) for keys in (decides, PLACEMENT, REPORT_ONLY)]
        assert sum(places) == 1 or (covers(("evaluate",), key) and places == [True, True, False]), key
    assert all(covers(decides, key) for key in FIDELITY_SWITCHES)
    assert all(covers((*STAGES["report"].keys, *PLACEMENT), key) for key in known_keys())


def test_a_stage_that_fails_is_not_taken_for_done_and_keeps_its_working_folder(tmp_path: Path) -> None:
    store = StageStore(tmp_path, {"base": "f00"})

    def fail(folder: Path) -> None:
        (folder / "half").write_text("done")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.ensure("base", fail)
    assert not store.has("base")

    found = []
    assert store.ensure("base", lambda folder: found.append((folder / "half").read_text()))
    assert found == ["done"]
    assert store.has("base") and not store.ensure("base", fail)


def test_of_two_runs_that_need_a_stage_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    made, started = [], threading.Event()

    def make(folder: Path) -> None:
        started.set()
        time.sleep(0.3)
        (folder / "model").write_text("done")
        made.append(folder)

    stores = [StageStore(tmp_path, {"base": "b0"}) for _ in range(2)]
    first = threading.Thread(target=stores[0].ensure, args=("base", make))
    first.start()
    assert started.wait(10)
    assert not stores[1].ensure("base", make)
    assert (stores[1].path("base") / "model").read_text() == "done"
    first.join()
    assert len(made) == 1


def test_a_finished_stage_keeps_no_state_of_its_training(tmp_path: Path) -> None:
    store = StageStore(tmp_path, {"base": "1"})

    def make(folder: Path) -> None:
        (folder / STATE).mkdir()
        (folder / STATE / "optimizer").write_bytes(bytes(9))
        (folder / "model").touch()

    store.ensure("base", make)
    assert [path.name for path in store.path("base").iterdir()] == ["model"]


def test_clean_frees_what_no_run_refers_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, *stages: str) -> None:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"run: {{name: mine, dir: {tmp_path}}}")
        used = {stage: os.path.relpath(tmp_path / "mine" / "stages" / stage, folder) for stage in stages}
        (folder / "run.json").write_text(json.dumps({"stages": used}))

    write("mine", "base-1", "text-1")
    write("rows/trials/0000", "base-2")  # a trial of `tune --from mine`
    kept = {"base-1", "base-2", "text-1.partial", ".locks"}
    for name in (*kept, "base-3", "text-2.partial", f"base-1/{STATE}"):
        (tmp_path / "mine" / "stages" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / "stages" / name / "file").write_bytes(bytes(10**6))
    main(["clean", str(tmp_path / "mine")], standalone_mode=False)
    assert "3.0 MB to free" in capsys.readouterr().out
    main(["clean", "--yes", str(tmp_path / "mine")], standalone_mode=False)
    assert "3.0 MB freed" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mine" / "stages").iterdir()} == kept
    assert not (tmp_path / "mine" / "stages" / "base-1" / STATE).exists()
