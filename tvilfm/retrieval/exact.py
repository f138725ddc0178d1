"""Exact search in memory, with the same arithmetic as the evaluation.

The first pass is one matrix product in the fastest available arithmetic (half precision on a GPU). It selects all rows
that could be among the best. The second pass scores these rows with `similarity`, as the evaluation does. The selection
allows for the rounding errors of both passes, so the result equals that of the second pass over all rows.

The rows are stored in immutable chunks. A change adds a chunk and replaces the masks of deleted rows. So following the
gallery costs only as much as its changes, and does not disturb running searches.

Shapes: Q queries, N rows of a chunk, R rows of the second pass, K ranked rows, P (query, row) pairs, D feature.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tvilfm.models.similarity import similarity
from tvilfm.retrieval.rows import FACTS, Where, column_of, vectors_of
from tvilfm.retrieval.store import Changes

CHUNK_ROWS = 1 << 18
SPARE = 64  # extra rows that the first pass ranks
# Rounding error of a product with a unit vector, relative to the length of the other vector. Half precision: four
# roundings of 2^-11 of inputs and sums, with a reserve for sums that a GPU splits. float32: per summand.
HALF_ERROR, FLOAT_ERROR = 2.0**-8, 2.0**-24
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Rows in the order of their scores, ties in the order of writing.

    Queries that are ranked together share their candidates, because each may rank the whole gallery.

    Attributes:
        candidates: (R) columns of `FACTS`.
        vectors_RD: float32 vectors of the candidates, in the searched space.
        rows_K: candidate index of each ranked row.
        scores_K: float32 scores of the ranked rows.
    """

    candidates: pa.Table
    vectors_RD: Tensor
    rows_K: npt.NDArray[np.int64]
    scores_K: npt.NDArray[np.float32]

    @property
    def facts(self) -> pa.Table:
        """Columns of `FACTS` for the K ranked rows."""
        return self.candidates.take(self.rows_K)

    @property
    def vectors_KD(self) -> Tensor:
        return self.vectors_RD[torch.from_numpy(self.rows_K)]

    def take(self, places: npt.NDArray[np.int64]) -> Ranked:
        return replace(self, rows_K=self.rows_K[places], scores_K=self.scores_K[places])

    def head(self, count: int) -> Ranked:
        """Return the first `count` rows, without the other candidates."""
        best = self.take(np.arange(min(count, len(self.rows_K))))
        rows_K = np.arange(len(best.rows_K))
        return replace(best, candidates=best.facts, vectors_RD=best.vectors_KD, rows_K=rows_K)

    def first_of_each_identity(self) -> Ranked:
        """Return the best row of each identity; a row without an identity counts as its own."""
        seen: set[str] = set()
        first = []
        for row, pid in enumerate(self.candidates["pid"].take(self.rows_K).to_pylist()):
            if pid not in seen:
                first.append(row)
                if pid is not None:
                    seen.add(pid)
        return self.take(np.array(first, dtype=np.int64))


def tensor_of(column: pa.ChunkedArray) -> Tensor:
    """Return a column of vectors as a read-only (N, D) float32 tensor, without a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(vectors_of(column))


def best_first(scores: npt.NDArray[np.float32], position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the order of the rows by descending score; ties are in the order of position."""
    return np.lexsort((position, -scores))


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some rows of the gallery.

    Attributes:
        stamps: see `rows.STORED`.
        facts: columns of `FACTS`.
        vectors: whether of the base space -> (N, D) float32.
        coarse: the same vectors in the arithmetic and on the device of the first pass.
        alive: which rows still exist.
    """

    stamps: npt.NDArray[np.int64]
    facts: pa.Table
    vectors: dict[bool, Tensor]
    coarse: dict[bool, Tensor]
    alive: Mask

    def __len__(self) -> int:
        return len(self.alive)

    def allowed(self, where: Where) -> Mask:
        expression = where.expression()
        if expression is None:
            return self.alive
        numbered = self.facts.select(("camid", "time")).append_column("row", pa.array(np.arange(len(self))))
        mask = np.zeros(len(self), dtype=bool)
        mask[numbered.filter(expression)["row"].to_numpy()] = True
        return mask & self.alive


class ExactIndex:
    """A copy of all rows of a gallery. Create it with `load`.

    Args:
        chunks: the rows.
        device: device of the first pass.
        half: whether the first pass uses half precision.
    """

    def __init__(self, chunks: Sequence[_Chunk], *, device: torch.device, half: bool) -> None:
        self._chunks, self._device, self._half = tuple(chunks), device, half

    @classmethod
    def load(
        cls, changes: Changes, *, device: torch.device, half: bool, before: ExactIndex | None = None
    ) -> ExactIndex:
        """Return a copy of the rows after changes.

        Args:
            changes: the changes since `before` was loaded, or all rows.
            device: device of the first pass.
            half: whether the first pass uses half precision.
            before: an earlier copy, which is not modified; None = no rows.
        """
        index = cls((), device=device, half=half)
        chunks = [] if before is None or changes.complete else list(before._chunks)
        rows = changes.rows
        gone = np.sort(np.concatenate([changes.removed, rows["stamp"].to_numpy()]))  # a replica may repeat rows
        if gone.size:
            chunks = [replace(chunk, alive=chunk.alive & ~np.isin(chunk.stamps, gone)) for chunk in chunks]
        for start in range(0, max(rows.num_rows, not chunks), CHUNK_ROWS):  # an empty gallery gets one empty chunk
            part = rows.slice(start, CHUNK_ROWS)
            vectors = {base: tensor_of(part[column_of(base)]) for base in (False, True)}
            chunks.append(index._chunk(part["stamp"].to_numpy(), part.select(FACTS).combine_chunks(), vectors))
        index._chunks = tuple(index._settled(chunks))
        return index

    def __len__(self) -> int:
        return sum(int(chunk.alive.sum()) for chunk in self._chunks)

    @torch.inference_mode()
    def rank(self, vectors_QD: Tensor, wheres: Sequence[Where], count: int, *, base: bool) -> list[Ranked]:
        """Return the best `count` rows of each query, or fewer if fewer rows match the filter.

        Args:
            vectors_QD: float32 on the CPU, not necessarily unit.
            wheres: filter on the rows, one per query.
            count: number of rows, at least 1.
            base: whether the base stage's vectors are compared.
        """
        keep, facts, vectors, scores = [], [], [], []
        for chunk in self._chunks:
            rows_R, keep_QR = self._first_pass(chunk, vectors_QD, wheres, count, base=base)
            vectors_RD = chunk.vectors[base]
            if len(rows_R) < len(chunk):
                vectors_RD = vectors_RD[rows_R]
            keep.append(keep_QR.numpy())
            facts.append(chunk.facts.take(rows_R.numpy()))
            vectors.append(vectors_RD)
            scores.append(similarity(vectors_QD, vectors_RD).numpy())
        candidates, candidates_RD = pa.concat_tables(facts), torch.cat(vectors)
        position_R = candidates["position"].to_numpy()
        ranked = []
        for keep_R, scores_R in zip(np.concatenate(keep, axis=1), np.concatenate(scores, axis=1), strict=True):
            own_K = np.flatnonzero(keep_R)
            best_K = own_K[best_first(scores_R[own_K], position_R[own_K])[:count]]
            ranked.append(
                Ranked(candidates=candidates, vectors_RD=candidates_RD, rows_K=best_K, scores_K=scores_R[best_K])
            )
        return ranked

    def _first_pass(
        self, chunk: _Chunk, vectors_QD: Tensor, wheres: Sequence[Where], count: int, *, base: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (R) rows that may be among the best of a query, and a (Q, R) mask of the queries they may rank for.

        No row that belongs in the result is missing.
        """
        coarse = chunk.coarse[base]
        coarse_QN = (vectors_QD.to(coarse) @ coarse.T).float()
        masks = {where: torch.from_numpy(chunk.allowed(where)) for where in set(wheres)}
        if not all(mask.all() for mask in masks.values()):
            # If all queries share one mask, use a single row: it stays in the CPU cache.
            masks_QN = torch.stack([masks[where] for where in (wheres if len(masks) > 1 else wheres[:1])])
            coarse_QN.masked_fill_(~masks_QN.to(coarse.device), -torch.inf)
        lowest = torch.finfo(torch.float32).min  # still above the minus infinity of masked rows
        least_Q1 = torch.full((len(vectors_QD), 1), lowest, device=coarse.device)
        best = coarse_QN.topk(min(count + SPARE, len(chunk)), dim=1)
        if count < len(chunk):
            # Each pass may be off by its error, both for the candidate row and for the last of the best rows.
            error = 2 * FLOAT_ERROR * vectors_QD.shape[1] + (HALF_ERROR if self._half else 0.0)
            slack_Q = (2 * error * vectors_QD.norm(dim=1)).to(coarse.device)
            least_Q1 = (best.values[:, count - 1] - slack_Q).clamp(min=lowest)[:, None]
        if best.values.shape[1] < len(chunk) and (best.values[:, -1:] >= least_Q1).any():  # more near ties than SPARE
            query_P, row_P = torch.nonzero(coarse_QN >= least_Q1, as_tuple=True)
        else:
            query_P, place_P = torch.nonzero(best.values >= least_Q1, as_tuple=True)
            row_P = best.indices[query_P, place_P]
        rows_R, place_P = torch.unique(row_P, return_inverse=True)
        keep_QR = torch.zeros(len(vectors_QD), len(rows_R), dtype=torch.bool, device=coarse.device)
        keep_QR[query_P, place_P] = True
        return rows_R.cpu(), keep_QR.cpu()

    def _chunk(self, stamps: npt.NDArray[np.int64], facts: pa.Table, vectors: dict[bool, Tensor]) -> _Chunk:
        coarse = vectors
        if self._half:
            coarse = {base: part.to(self._device, torch.float16) for base, part in vectors.items()}
        return _Chunk(
            stamps=stamps, facts=facts, vectors=vectors, coarse=coarse, alive=np.ones(len(stamps), dtype=bool)
        )

    def _settled(self, chunks: Sequence[_Chunk]) -> list[_Chunk]:
        """Keep the chunks few and dense: join neighbours of similar size, and rewrite chunks that are half deleted.

        As in a binary counter, a row is copied once each time its chunk doubles in size.
        """
        settled: list[_Chunk] = []
        for chunk in chunks:
            if 2 * int(chunk.alive.sum()) < len(chunk):
                chunk = self._joined([chunk])
            while settled and len(settled[-1]) <= 2 * len(chunk) and len(settled[-1]) + len(chunk) <= CHUNK_ROWS:
                chunk = self._joined([settled.pop(), chunk])
            if len(chunk) or not settled:
                settled.append(chunk)
        return settled

    def _joined(self, chunks: Sequence[_Chunk]) -> _Chunk:
        alive = [torch.from_numpy(chunk.alive) for chunk in chunks]
        facts = pa.concat_tables([chunk.facts.filter(pa.array(chunk.alive)) for chunk in chunks])
        return self._chunk(
            np.concatenate([chunk.stamps[chunk.alive] for chunk in chunks]),
            facts.combine_chunks(),
            {
                base: torch.cat([chunk.vectors[base][mask] for chunk, mask in zip(chunks, alive, strict=True)])
                for base in (False, True)
            },
        )
