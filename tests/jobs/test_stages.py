"""Which stages a changed key touches, and what a killed stage leaves behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cluster.stages import STAGES, StageStore, stage_fingerprints, stages_of
from tvilfm.config import FIDELITY_SWITCHES, Config, known_keys, load_config

DATASET = {"dataset": "d0", "captions": "c0"}
FREE = (
    *("run.name", "run.dir", "run.stages_dir", "run.trackers", "run.mlflow_uri"),
    *("data.name", "data.root", "data.decode_batch", "data.synthetic", "data.split", "data.captions"),
    *("caption.workers", "caption.decoders", "caption.max_bad_share"),
    *("train.loader_workers", "gallery", "serve", "cluster", "fidelity"),
)


def _load(*overrides: str) -> Config:
    return load_config(Path("ray_config.yaml"), ["caption.source=files", *overrides], size="tiny")


def _changed(before: Config, after: Config, dataset: dict[str, str] = DATASET) -> set[str]:
    old, new = stage_fingerprints(before, DATASET), stage_fingerprints(after, dataset)
    return {name for name in STAGES if old.get(name) != new.get(name)}


AFTER_TEXT = {"text", "features", "results", "report"}
CASES = {
    "evaluate.ensemble.text=2": {"results", "report"},
    "evaluate.text_sources=[witness]": {"features", "results", "report"},
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
    "run.name=other": set(),
    "caption.train.epochs=9": set(),  # captions come from files
}


@pytest.mark.parametrize("override", CASES)
def test_a_changed_key_changes_exactly_the_stages_that_depend_on_it(override: str) -> None:
    assert _changed(_load(), _load(override)) == CASES[override]


def test_new_captions_redo_the_text_stage_and_leave_the_base_model() -> None:
    config = _load()
    assert _changed(config, config, {**DATASET, "captions": "c1"}) == AFTER_TEXT
    assert _changed(config, config, {**DATASET, "dataset": "d1"}) == set(stages_of(config)) - {"pretrain"}


def test_captions_that_the_run_writes_decide_what_builds_on_them_and_those_of_files_nothing_else() -> None:
    finetuned = _load("caption.source=finetuned")

    def changed(override: str) -> set[str]:
        return _changed(finetuned, _load("caption.source=finetuned", override))

    assert changed("caption.infrared.beams=2") == {"captioner_infrared", "captions"} | AFTER_TEXT
    assert changed("caption.train.epochs=9") == {"captioner_visible", "captioner_infrared", "captions"} | AFTER_TEXT
    assert changed("caption.rephrase.max_words=9") == {"captions"} | AFTER_TEXT
    assert changed("run.seed=1").isdisjoint({"captioner_visible", "captioner_infrared", "captions"})
    assert _changed(finetuned, finetuned, {**DATASET, "captions": "c1"}) == changed("caption.train.epochs=9")
    written = _load("caption.source=captioner")
    assert stages_of(written)[:3] == ["pixels", "captions", "pretrain"]
    assert stage_fingerprints(written, {"dataset": "d0"}).keys() == set(stages_of(written))


def test_every_key_is_read_by_a_stage_or_listed_as_without_influence() -> None:
    read = {key for stage in STAGES.values() for key in stage.keys}

    def covered(key: str, by: tuple[str, ...] | set[str]) -> bool:
        return any(key == prefix or key.startswith(prefix + ".") for prefix in by)

    for key in known_keys():
        assert covered(key, read) != covered(key, FREE), key
    assert all(covered(key, read) for key in FIDELITY_SWITCHES)


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
