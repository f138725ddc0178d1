"""Record the known facts about the training of a model that is evaluated without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tvilfm.config import DataSection
from tvilfm.data.manifest import column, select
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.models.opening import OpenedModel

FILE = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a model.

    Attributes:
        path: the opened path.
        reported: assumptions and changes made when opening it, one sentence each.
        dataset: `data.name` of its training; None = not recorded.
        split: `data.split` of its training.
        pids: training identities, with the numbers of that dataset; empty = not recorded.
    """

    path: str
    reported: Sequence[str]
    dataset: str | None
    split: int
    pids: Sequence[int]

    @classmethod
    def of(cls, opened: OpenedModel) -> Provenance:
        """Return the provenance that an opened model's folder records."""
        run = opened.path / "run.json"
        pids: list[int] = []
        if run.is_file():
            stages = json.loads(run.read_text())["stages"]
            manifest = opened.path / stages.get("pixels", "") / "manifest.parquet"
            if manifest.is_file():
                train = opened.config.train
                splits = ("train", "val") if train.base.use_val or train.text.use_val else ("train",)
                pids = sorted(set(column(select(pq.read_table(manifest), split=splits), "pid").tolist()))
        return cls(
            path=str(opened.path),
            reported=opened.reported,
            dataset=opened.config.data.name if run.is_file() else None,
            split=opened.config.data.split,
            pids=pids,
        )

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        return cls(**json.loads((folder / FILE).read_text()))

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2))

    def notes(self, data: DataSection, manifest: pa.Table) -> list[str]:
        """Return notes for readers of the results; warnings begin with "Warning:".

        Args:
            data: dataset of the evaluation.
            manifest: rows of that dataset.
        """
        notes = [f"Nothing was trained: the model of {self.path} was evaluated.", *self.reported]
        if self.dataset is None:
            return [*notes, "Its training data are not recorded: test identities may have been trained on."]
        trained_on = self.dataset + (f", split {self.split}" if self.dataset == "regdb" else "")
        notes.append(f"It was trained on {trained_on}.")
        if self.dataset != data.name:
            return notes
        tested = set(column(select(manifest, split=TEST_SPLITS), "pid").tolist())
        if both := tested & set(self.pids):
            notes.append(
                f"Warning: {len(both)} of the {len(tested)} test identities are training identities of the model. "
                "These numbers do not measure how well it finds unseen people."
            )
        elif not self.pids:
            notes.append("Warning: its training identities are not recorded; test identities may be among them.")
        return notes
