"""What a reader is told of a model that meets other data."""

from __future__ import annotations

import pytest

from tests.untrained_run import UntrainedRun
from tvilfm.config import DataSection
from tvilfm.data.manifest import build_manifest
from tvilfm.evaluation.provenance import Provenance
from tvilfm.models.opening import open_model

MANIFEST = build_manifest(
    {"image": f"{pid}", "pid": pid, "camid": 1, "modality": "visible", "split": split}
    for pid, split in ((1, "train"), (2, "query"), (3, "gallery"), (4, "query"))
)


def _notes(dataset: str | None, pids: tuple[int, ...], split: int = 2) -> list[str]:
    provenance = Provenance(path="model", reported=("Opened so.",), dataset=dataset, split=1, pids=pids)
    return provenance.notes(DataSection(name="regdb", split=split), MANIFEST)


def test_test_identities_that_a_model_was_trained_on_are_a_warning() -> None:
    notes = _notes("regdb", (1, 3, 4))
    assert "Opened so." in notes and "It was trained on regdb, split 1." in notes
    assert notes[-1].startswith("Warning: 2 of the 3 test identities are training identities")


@pytest.mark.parametrize(
    ("dataset", "pids", "last"),
    [
        ("regdb", (1, 5), "It was trained on regdb, split 1."),
        ("llcm", (2, 3), "It was trained on llcm."),  # numbers of another dataset are other people
        ("regdb", (), "Warning: its training identities are not recorded"),
        (None, (), "Its training data are not recorded"),
    ],
)
def test_other_models_get_what_is_known(dataset: str | None, pids: tuple[int, ...], last: str) -> None:
    assert _notes(dataset, pids)[-1].startswith(last)


def test_a_runs_model_brings_the_identities_that_it_was_trained_on(untrained_run: UntrainedRun) -> None:
    provenance = Provenance.of(open_model(untrained_run.config.run.path))
    rows = untrained_run.manifest.to_pylist()
    assert provenance.dataset == "synthetic"
    assert set(provenance.pids) == {row["pid"] for row in rows if row["split"] == "train"}
