"""Re-rank with k-reciprocal encoding or query expansion.

Both use the gallery to correct a query. k-reciprocal re-ranking checks whether two images are among each other's
nearest neighbours. Query expansion adds a query's nearest gallery features to it and searches again. Neither stores the
matrix of all pairs: rows are processed in chunks, and only the few neighbours of each are kept.

Shape suffixes: Q query, G gallery, N query and gallery together (query first), D feature, C rows of one chunk,
K neighbours, H neighbours of the smaller neighbourhood, E non-zero entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def k_reciprocal_rerank(
    query_QD: Tensor,
    gallery_GD: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    chunk: int = 256,
) -> Tensor:
    """Re-rank by the overlap of the mutual neighbours of two images.

    Each image is encoded by its k1-reciprocal neighbours: those that also have it among their own k1 nearest. This set
    is extended by the k1/2-reciprocal sets that overlap it by more than two thirds. The encoding is weighted by
    exp(-distance) and averaged over the image's k2 nearest. The Jaccard distance of two encodings is then mixed with
    the original distance, which is squared Euclidean divided by the row's maximum.

    Args:
        query_QD: [Q, D] unit vectors.
        gallery_GD: [G, D] unit vectors, same dtype and device.
        k1: neighbourhood size, >= 1.
        k2: number of averaged encodings, >= 1; 1 for no averaging.
        lambda_value: share of the original distance, 0-1.
        chunk: rows processed at a time; limits the memory to about chunk x (Q + G) numbers and, while sets are
            extended, chunk x k1^3 / 2 bytes.

    Returns:
        [Q, G] similarity: the negative mixed distance, between -1 and 0; higher is closer.

    Raises:
        ValueError: shapes do not fit, vectors are not of unit length, or a parameter is out of range.

    Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017.
    Differs: memory only. The released code holds several (Q + G)^2 matrices.
    """
    _check_pair(query_QD, gallery_GD)
    for name, value in (("k1", k1), ("k2", k2), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"rerank.{name}: expected >= 1, got {value}. Raise it.")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"rerank.lambda_value: expected 0 to 1, got {lambda_value}. Choose a share.")
    feature_ND = torch.cat([query_QD, gallery_GD])
    num_queries, num_images = len(query_QD), len(feature_ND)
    neighbour_NK = _nearest(feature_ND, max(min(k1 + 1, num_images), min(k2, num_images)), chunk)
    code = _reciprocal_code(feature_ND, neighbour_NK, k1, chunk)
    if k2 > 1:
        code = _averaged_code(code, neighbour_NK[:, :k2], chunk)
    shared_QG = _shared_weight(code, num_queries, num_images, chunk)
    similarity_QG = torch.empty_like(shared_QG)
    for low in range(0, num_queries, chunk):
        high = min(low + chunk, num_queries)
        jaccard_CG = 1 - shared_QG[low:high] / (2 - shared_QG[low:high])
        original_CG = _distance(feature_ND, low, high)[:, num_queries:]
        similarity_QG[low:high] = -((1 - lambda_value) * jaccard_CG + lambda_value * original_CG)
    return similarity_QG


def expand_queries(
    query_QD: Tensor, gallery_GD: Tensor, *, k: int = 5, alpha: float = 3.0, chunk: int = 1024
) -> Tensor:
    """Add to each query its k nearest gallery features, weighted by similarity to the power alpha.

    Negative similarities have weight 0, except with alpha 0, which is plain average query expansion.

    Args:
        query_QD: [Q, D] unit vectors.
        gallery_GD: [G, D] unit vectors, same dtype and device.
        k: number of added gallery features, >= 1; all of them if the gallery is smaller.
        alpha: >= 0; higher values give near neighbours more weight.
        chunk: queries processed at a time; limits the memory to chunk x G numbers.

    Returns:
        [Q, D] unit vectors.

    Raises:
        ValueError: shapes do not fit, vectors are not of unit length, or a parameter is out of range.

    Source: average: Chum et al., Total Recall, ICCV 2007. alpha: Radenovic et al., TPAMI 2019.
    Differs: none known.
    """
    _check_pair(query_QD, gallery_GD)
    for name, value, least in (("k", k, 1), ("alpha", alpha, 0), ("chunk", chunk, 1)):
        if value < least:
            raise ValueError(f"expand.{name}: expected >= {least}, got {value}. Raise it.")
    expanded = []
    for query_CD in torch.split(query_QD, chunk):
        near = (query_CD @ gallery_GD.T).topk(min(k, len(gallery_GD)), dim=1)
        weight_CK = near.values.clamp(min=0) ** alpha
        added_CD = (weight_CK[:, :, None] * gallery_GD[near.indices]).sum(dim=1)
        expanded.append(F.normalize(query_CD + added_CD, dim=1))
    return torch.cat(expanded)


class _Code(NamedTuple):
    """Sparse [N, N] encoding, entries in row order."""

    row_E: Tensor
    column_E: Tensor
    weight_E: Tensor
    num_images: int

    def starts(self) -> Tensor:
        """Return the index [N + 1] at which each row's entries begin."""
        counts = torch.bincount(self.row_E, minlength=self.num_images)
        return F.pad(counts.cumsum(0), (1, 0))


def _check_pair(query_QD: Tensor, gallery_GD: Tensor) -> None:
    shapes = (tuple(query_QD.shape), tuple(gallery_GD.shape))
    if query_QD.ndim != 2 or gallery_GD.ndim != 2 or query_QD.shape[1] != gallery_GD.shape[1]:
        raise ValueError(f"query_QD, gallery_GD: expected [Q, D] and [G, D], got {shapes}. Pass one row per image.")
    if 0 in (*shapes[0], *shapes[1]):
        raise ValueError(f"query_QD, gallery_GD: expected at least one image each, got {shapes}. Check the split.")
    for name, feature in (("query_QD", query_QD), ("gallery_GD", gallery_GD)):
        worst = float((feature.norm(dim=1) - 1).abs().max())
        if not worst < 1e-2:
            raise ValueError(f"{name}: expected unit vectors, got lengths up to {worst:.3g} off. Normalise them.")


def _distance(feature_ND: Tensor, low: int, high: int) -> Tensor:
    """Return the squared Euclidean distance [C, N] of rows [low, high) to all rows, divided by each row's maximum."""
    distance_CN = (2 - 2 * feature_ND[low:high] @ feature_ND.T).clamp(min=0)
    return distance_CN / distance_CN.amax(dim=1, keepdim=True).clamp(min=torch.finfo(distance_CN.dtype).tiny)


def _nearest(feature_ND: Tensor, count: int, chunk: int) -> Tensor:
    """Return the indices [N, K] of the nearest images, including the image itself, nearest first."""
    return torch.cat(
        [(part_CD @ feature_ND.T).topk(count, dim=1).indices for part_CD in torch.split(feature_ND, chunk)]
    )


def _mutual(neighbour_NK: Tensor, chunk: int) -> Tensor:
    """Return whether each neighbour has the image among its own neighbours, [N, K]."""
    own_N = torch.arange(len(neighbour_NK), device=neighbour_NK.device)
    return torch.cat(
        [
            (neighbour_NK[near_CK] == own_C[:, None, None]).any(dim=2)
            for near_CK, own_C in zip(torch.split(neighbour_NK, chunk), torch.split(own_N, chunk), strict=True)
        ]
    )


def _reciprocal_code(feature_ND: Tensor, neighbour_NK: Tensor, k1: int, chunk: int) -> _Code:
    near_NK = neighbour_NK[:, : k1 + 1]
    near_NH = neighbour_NK[:, : round(k1 / 2) + 1]
    mutual_NK, mutual_NH = _mutual(near_NK, chunk), _mutual(near_NH, chunk)
    num_images, device = len(feature_ND), feature_ND.device
    rows, columns, weights = [], [], []
    for low in range(0, num_images, chunk):
        high = min(low + chunk, num_images)
        near_CK, mutual_CK = near_NK[low:high], mutual_NK[low:high]
        wider_CKH, valid_CKH = near_NH[near_CK], mutual_NH[near_CK] & mutual_CK[:, :, None]
        members_CK = near_CK.masked_fill(~mutual_CK, -1)
        inside_CKH = (wider_CKH[:, :, :, None] == members_CK[:, None, None, :]).any(dim=3) & valid_CKH
        accepted_CK = inside_CKH.sum(dim=2) > 2 / 3 * valid_CKH.sum(dim=2)
        set_CN = torch.zeros((high - low, num_images), dtype=torch.bool, device=device)
        nth_C = torch.arange(high - low, device=device)
        row, place = mutual_CK.nonzero(as_tuple=True)
        set_CN[nth_C[row], near_CK[row, place]] = True
        row, place, member = (valid_CKH & accepted_CK[:, :, None]).nonzero(as_tuple=True)
        set_CN[nth_C[row], wider_CKH[row, place, member]] = True
        row, column = set_CN.nonzero(as_tuple=True)
        weight_CN = torch.exp(-_distance(feature_ND, low, high)) * set_CN
        weight_CN = weight_CN / weight_CN.sum(dim=1, keepdim=True)
        rows.append(row + low)
        columns.append(column)
        weights.append(weight_CN[row, column])
    return _Code(torch.cat(rows), torch.cat(columns), torch.cat(weights), num_images)


def _averaged_code(code: _Code, near_NK: Tensor, chunk: int) -> _Code:
    """Return the mean of the codes of each image's nearest images."""
    start = code.starts()
    rows, columns, weights = [], [], []
    for low in range(0, code.num_images, chunk):
        near_CK = near_NK[low : low + chunk]
        mean_CN = torch.zeros((len(near_CK), code.num_images), dtype=code.weight_E.dtype, device=near_CK.device)
        for nth in range(near_CK.shape[1]):
            row, entry = _entries(start, near_CK[:, nth])
            # A column occurs only once in a neighbour's code, so in-place addition is safe.
            mean_CN[row, code.column_E[entry]] += code.weight_E[entry]
        mean_CN /= near_CK.shape[1]
        row, column = mean_CN.nonzero(as_tuple=True)
        rows.append(row + low)
        columns.append(column)
        weights.append(mean_CN[row, column])
    return _Code(torch.cat(rows), torch.cat(columns), torch.cat(weights), code.num_images)


def _entries(start: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the concatenated entries of the listed rows: the position of each in the list, and its entry index."""
    count = start[of + 1] - start[of]
    place = torch.repeat_interleave(torch.arange(len(of), device=of.device), count)
    within = torch.arange(len(place), device=of.device) - (count.cumsum(0) - count)[place]
    return place, start[of][place] + within


def _shared_weight(code: _Code, num_queries: int, num_images: int, chunk: int) -> Tensor:
    """Return, for each query and gallery image, the sum over all images of the smaller of their two weights, [Q, G].

    Only images in both codes count. The gallery's codes are therefore inverted to one list of gallery images per image,
    and a query visits only the lists of the images in its own code.
    """
    start = code.starts()
    first = start[num_queries]
    order = code.column_E[first:].argsort(stable=True)
    gallery_E = code.row_E[first:][order] - num_queries
    weight_E = code.weight_E[first:][order]
    counts = torch.bincount(code.column_E[first:], minlength=num_images)
    list_start = F.pad(counts.cumsum(0), (1, 0))
    num_gallery = num_images - num_queries
    shared_QG = torch.zeros((num_queries, num_gallery), dtype=weight_E.dtype, device=weight_E.device)
    step = max(1, chunk // 4)  # a query visits some ten thousand list entries of five numbers each
    for low in range(0, num_queries, step):
        high = min(low + step, num_queries)
        mine = slice(int(start[low]), int(start[high]))
        place, entry = _entries(list_start, code.column_E[mine])
        row = code.row_E[mine][place] - low
        smaller = torch.minimum(code.weight_E[mine][place], weight_E[entry])
        shared_QG[low:high].view(-1).index_add_(0, row * num_gallery + gallery_E[entry], smaller)
    return shared_QG
