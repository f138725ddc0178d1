"""P x K batches: P identities, K visible and K infrared images of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PKBatch:
    """Rows of one batch.

    Entry i of `visible` and of `infrared` has the label `labels[i]`; each identity has K consecutive entries.
    """

    epoch: int
    index: int
    labels: Rows
    visible: Rows
    infrared: Rows


class PKSampler(Sampler[PKBatch]):
    """Draw batches of P identities without replacement, and K images per modality with replacement.

    Batch i of epoch e depends only on (seed, e, i). A run that was killed and resumed, or that has another number of
    workers, therefore gets the same batches.

    Args:
        p: identities per batch.
        k: visible images per identity, and the same number of infrared images.
        visible_labels: int64 label of every visible training row.
        infrared_labels: int64 label of every infrared training row.
        seed: seed of the run.

    Raises:
        ValueError: fewer identities than p have images in both modalities.

    Source: METHOD 4: int(N/32)+1 batches per epoch, N = number of images of the larger modality. Differs: identities
        are drawn from those with images in both modalities; the random stream is ours.
    """

    def __init__(self, p: int, k: int, *, visible_labels: Rows, infrared_labels: Rows, seed: int) -> None:
        if p < 2:
            raise ValueError(f"train.p: expected >= 2 identities per batch, got {p}. Raise p.")
        if k < 1:
            raise ValueError(f"train.k: expected >= 1 image per identity and modality, got {k}. Raise k.")
        self.p, self.k, self.seed = p, k, seed
        self.epoch = 0
        self._visible = _rows_by_label(visible_labels)
        self._infrared = _rows_by_label(infrared_labels)
        self._labels = np.array(sorted(self._visible.keys() & self._infrared.keys()), dtype=np.int64)
        if len(self._labels) < p:
            raise ValueError(
                f"train.p: expected at most {len(self._labels)}, the number of identities with visible and infrared "
                f"training images, got {p}. Lower p or check the dataset."
            )
        self.num_batches = max(len(visible_labels), len(infrared_labels)) // (p * k) + 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[PKBatch]:
        for index in range(self.num_batches):
            rng = np.random.default_rng([self.seed, 11, self.epoch, index])
            labels = rng.choice(self._labels, self.p, replace=False)
            yield PKBatch(
                epoch=self.epoch,
                index=index,
                labels=np.repeat(labels, self.k),
                visible=np.concatenate([rng.choice(self._visible[label], self.k) for label in labels]),
                infrared=np.concatenate([rng.choice(self._infrared[label], self.k) for label in labels]),
            )


def _rows_by_label(labels: Rows) -> dict[int, Rows]:
    order = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[order], return_index=True)
    return {int(value): rows for value, rows in zip(values, np.split(order, starts[1:]), strict=True)}
