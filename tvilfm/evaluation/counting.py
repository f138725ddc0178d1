"""Count the gallery images ahead of each true match, which is all that CMC, mAP and mINP need of a ranking.

Counting compares a row with each of its few true matches, which processors do on many numbers at once. Sorting the
whole row for a few positions would be slower. Eight comparison results, one byte each, are summed in one 64-bit
addition.

Ties rank by the order of the gallery: an equal similarity is ahead of a true match if it is left of it (>=), but not if
it is right of it (>). If the true matches of a chunk are close together, only the columns between the first and the
last match need both comparisons.

Shape suffixes as in `metrics`, and W 64-bit words of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Matrix = npt.NDArray[Any] | Tensor
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Comparison results, one byte each, that are processed at a time. On a CPU, about the size of a level-2 cache (measured
# with 1 MiB: an eighth is up to 1.3 times slower, twice the size is no faster). On other devices, enough to fill the
# device.
_CACHE_BYTES = 2**20
_DEVICE_BYTES = 2**28


@dataclass(frozen=True)
class Ignored:
    """Ignored entries: all hidden columns in the blind rows, and single entries in order of their rows.

    By the SYSU-MM01 rule, blind rows are queries of camera 3, and hidden columns are gallery images of camera 2.
    """

    blind_R: Bools
    hidden_G: Bools
    rows: Ints
    columns: Ints


def take_rows(matrix: Matrix, rows: Ints) -> Matrix:
    """Return rows of the matrix, without a copy if they are consecutive; as numpy if they are in main memory."""
    index: Any = slice(int(rows[0]), int(rows[-1]) + 1) if bool((np.diff(rows) == 1).all()) else rows
    if isinstance(matrix, np.ndarray):
        block_RG: npt.NDArray[Any] = matrix[index]
        return block_RG.astype(np.float32) if block_RG.dtype == np.float16 else block_RG
    part = matrix[index if isinstance(index, slice) else torch.from_numpy(index).to(matrix.device)]
    if part.device.type != "cpu":
        return part
    return (part.float() if part.dtype in (torch.float16, torch.bfloat16) else part).numpy()


def count_ahead(
    block_RG: Matrix, column_RP: Ints, num_matches_R: Ints, ignored: Ignored, *, want_best: bool
) -> tuple[Ints, Bools | None]:
    """Count the images ahead of each true match, and mark the images ahead of the best match.

    Args:
        block_RG: [R, G] similarity, from `take_rows`.
        column_RP: [R, P] columns of the true matches.
        num_matches_R: [R] number of columns that are not padding.
        ignored: ignored entries.
        want_best: whether to return the marks.

    Returns:
        Number of images ahead [R, P], undefined for padding; and the marks [R, G], all false without a match, or None.
    """
    if not isinstance(block_RG, np.ndarray):
        return _ahead_on_device(block_RG, column_RP, ignored, want_best=want_best)
    # When numpy compares rows shorter than a quarter of its 8,192-element buffer with a column, it first
    # copies them into the buffer, which takes three times as long as comparing them in place.
    numpy_buffer = np.setbufsize(1024)
    try:
        return _ahead_on_cpu(block_RG, column_RP, num_matches_R, ignored, want_best=want_best)
    finally:
        np.setbufsize(numpy_buffer)


def _ahead_on_cpu(
    block_RG: npt.NDArray[Any], column_RP: Ints, num_matches_R: Ints, ignored: Ignored, *, want_best: bool
) -> tuple[Ints, Bools | None]:
    """Do what `count_ahead` says in main memory, on runs of rows that fit the cache."""
    num_rows, num_gallery = block_RG.shape
    # A byte of a 64-bit sum overflows after 255 words, so rows are split into runs of at most that length.
    words = -(-num_gallery // 8)
    runs = -(-words // 255)
    width = -(-words // runs) * runs * 8
    seen = np.ones((2, width), dtype=bool)
    seen[1, :num_gallery] = ~ignored.hidden_G
    seen_words = seen.view(np.uint64)
    blind_R = ignored.blind_R.astype(np.int64) if ignored.hidden_G.any() else None

    value_RP = block_RG[np.arange(num_rows)[:, None], column_RP]
    best_R = value_RP.argmax(axis=1)
    best_RG = np.zeros((num_rows, width), dtype=bool) if want_best else None
    total_RPW = np.zeros((*column_RP.shape, runs), dtype=np.uint64)
    cuts = _cuts(num_matches_R * width, _CACHE_BYTES)
    places_of = np.maximum.reduceat(num_matches_R, cuts[:-1]).tolist()
    first_of = np.minimum.reduceat(column_RP.min(axis=1), cuts[:-1]).tolist()
    last_of = (np.maximum.reduceat(column_RP.max(axis=1), cuts[:-1]) + 1).tolist()
    ignored_of = np.searchsorted(ignored.rows, cuts).tolist()
    most = max((high - low) * places for (low, high), places in zip(pairwise(cuts), places_of, strict=True))
    buffer = np.empty(most * width, dtype=bool)
    for n, (low, high) in enumerate(pairwise(cuts)):
        rows, places, first, last = high - low, places_of[n], first_of[n], last_of[n]
        mask_RPG = buffer[: rows * places * width].reshape(rows, places, width)
        block, value = block_RG[low:high, None], value_RP[low:high, :places, None]
        np.greater_equal(block[:, :, :first], value, out=mask_RPG[:, :, :first])
        np.greater(block[:, :, last:], value, out=mask_RPG[:, :, last:num_gallery])
        between = mask_RPG[:, :, first:last]
        np.greater(block[:, :, first:last], value, out=between)
        equal = block[:, :, first:last] == value
        if np.count_nonzero(equal) > rows * places:  # more equal pairs than each match with itself
            between |= equal & (np.arange(first, last) < column_RP[low:high, :places, None])
        if ignored_of[n] < ignored_of[n + 1]:
            here = slice(ignored_of[n], ignored_of[n + 1])
            mask_RPG[ignored.rows[here] - low, :, ignored.columns[here]] = False
        mask_RPG[:, :, num_gallery:] = False
        word_RPW = mask_RPG.view(np.uint64)
        if blind_R is not None:
            word_RPW &= seen_words[blind_R[low:high], None]
        np.add.reduce(word_RPW.reshape(rows, places, runs, -1), axis=-1, out=total_RPW[low:high, :places])
        if best_RG is not None and places:
            best_RG[low:high] = mask_RPG[np.arange(rows), best_R[low:high]]
    return _byte_sums(total_RPW).sum(axis=-1), None if best_RG is None else best_RG[:, :num_gallery]


def _byte_sums(words: npt.NDArray[np.uint64]) -> Ints:
    """Return the sum of the eight bytes of each word: add neighbours, then add the four pairs by a multiplication."""
    even = np.uint64(0x00FF00FF00FF00FF)
    pairs = (words & even) + ((words >> np.uint64(8)) & even)
    return ((pairs * np.uint64(0x0001000100010001)) >> np.uint64(48)).astype(np.int64)


def _ahead_on_device(
    block_RG: Tensor, column_RP: Ints, ignored: Ignored, *, want_best: bool
) -> tuple[Ints, Bools | None]:
    """Do the same as `_ahead_on_cpu` on a torch device, in a simpler way that needs more memory bandwidth."""

    def send(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(block_RG.device)

    num_rows, num_gallery = block_RG.shape
    position_G = torch.arange(num_gallery, device=block_RG.device)
    column, hidden_G = send(column_RP), send(ignored.hidden_G)
    ahead, best = [], []
    cuts = _cuts(np.full(num_rows, column_RP.shape[1] * num_gallery), _DEVICE_BYTES)
    for low, high in pairwise(cuts):
        block, columns = block_RG[low:high, None], column[low:high, :, None]
        value = block_RG[low:high].gather(1, column[low:high])[:, :, None]
        mask_RPG = (block > value) | ((block == value) & (position_G < columns))
        mask_RPG &= ~(send(ignored.blind_R[low:high])[:, None, None] & hidden_G)
        here = slice(*np.searchsorted(ignored.rows, (low, high)))
        mask_RPG[send(ignored.rows[here] - low), :, send(ignored.columns[here])] = False
        count_RP = mask_RPG.sum(dim=2)
        ahead.append(count_RP.cpu().numpy())
        if want_best:
            # The best match has the fewest images ahead of it; padding repeats a match.
            nth_R = torch.arange(high - low, device=block_RG.device)
            best.append(mask_RPG[nth_R, count_RP.argmin(dim=1)].cpu().numpy())
    return np.concatenate(ahead), np.concatenate(best) if want_best else None


def _cuts(cost_R: Ints, budget: int) -> list[int]:
    """Return the bounds, including both ends, of runs of rows with a cost of about `budget` and at least one row."""
    run_R = (np.cumsum(cost_R) - cost_R) // budget
    return [0, *(np.flatnonzero(np.diff(run_R)) + 1).tolist(), len(cost_R)]
