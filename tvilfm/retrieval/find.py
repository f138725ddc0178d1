"""Find a person in a folder of images, without labels, cameras, splits, a gallery or a service.

Every image of the folder is treated as visible and encoded once. Its vectors are stored under the hash of its content,
and so are the vectors of the query. A later call encodes only new images and queries; if nothing is new, it does not
load the model. The ranking is that of the evaluation: the same spaces, ensemble and similarity.

The store is a folder of FeatureTables, one per encoded batch. Files are only added. Each is written completely and then
renamed, so concurrent calls do not interfere.

Shapes: N images of the folder, D feature.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tvilfm.config import EnsembleWeights
from tvilfm.data import image_files
from tvilfm.data.pixels import decode
from tvilfm.data.tokens import CONTEXT, is_cut
from tvilfm.evaluation.features import FeatureTable
from tvilfm.files import cache_folder, content_digests
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.models.ensemble import ensemble_query
from tvilfm.models.opening import OpenedModel, model_fingerprint
from tvilfm.models.similarity import similarity
from tvilfm.retrieval.found import Found, printable
from tvilfm.retrieval.query import query_parts
from tvilfm.retrieval.spaces import Heads

BATCH = 32
SAVED = 1024  # images per write to the store: an interrupted call loses at most this many
DECODING = "upright"  # part of the store's folder name: change it with the pixels that `decode` returns
NAMED = 5  # unreadable images that are named in the warning
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class FolderFeatures:
    """Unit vectors of the readable images of a folder.

    Attributes:
        names: paths relative to the folder, sorted, with / as separator.
        vectors_ND: float32, from the current head.
        base_vectors_ND: float32, from the base stage's head.
        unreadable: paths of images that could not be decoded.
        encoded: number of newly encoded images; the vectors of the others were in the store.
    """

    names: tuple[str, ...]
    vectors_ND: Vectors
    base_vectors_ND: Vectors
    unreadable: tuple[str, ...]
    encoded: int


def list_images(folder: Path) -> list[str]:
    """Return the sorted relative paths of all images in a folder and its subfolders, each real file once.

    Raises:
        ValueError: the folder does not exist or contains no image.
    """
    if not folder.is_dir():
        raise ValueError(f"--in: expected a folder of images, got {folder}. Check the path.")
    names = image_files.list_images(folder)
    if not names:
        suffixes = " ".join(image_files.SUFFIXES)
        raise ValueError(f"--in: expected images ({suffixes}) in {folder}, got none. Check the path.")
    return names


def store_folders(opened: OpenedModel) -> list[Path]:
    """Return the folders that may store features, preferred first: beside the model, then in the user's cache."""
    path = opened.path.absolute()
    beside = path / "find" if path.is_dir() else path.with_name(f"{path.name}.find")
    return [beside, cache_folder() / "find"]


class Store:
    """Vectors that earlier calls have stored.

    Args:
        folders: all are read; new files go to the first writable one.
        space: subfolder of each, named after the model and its image size.
    """

    def __init__(self, folders: Sequence[Path], space: str) -> None:
        self._folders, self._space = tuple(folders), space

    def load(self, keys: set[str]) -> dict[str, Vectors]:
        """Return the stored vectors of the given keys. Damaged files are skipped."""
        vectors: dict[str, Vectors] = {}
        for folder in self._folders:
            for path in sorted((folder / self._space).glob("*.parquet")):
                try:
                    table = FeatureTable.read(path)
                except (OSError, ValueError, KeyError):
                    continue
                vectors |= {key: row for key, row in zip(table.keys, table.vectors_ND, strict=True) if key in keys}
        return vectors

    def add(self, features: Mapping[str, Vectors]) -> None:
        table = FeatureTable(keys=tuple(features), vectors_ND=np.stack(list(features.values())))
        name = hashlib.sha256("".join(features).encode()).hexdigest()[:16]
        for folder in self._folders:
            try:
                table.write(folder / self._space / f"{name}.parquet")
            except OSError:
                continue  # read-only or full: use the next folder, or store nothing, which only costs time
            return


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return path -> digest of the content, for all readable files."""
    readable = [name for name in names if os.access(folder / name, os.R_OK)]
    digests = content_digests(folder, readable)
    return {name: digest.hex() for name, digest in zip(readable, digests, strict=True)}


def folder_features(
    opened: OpenedModel, folder: Path, store: Store, *, progress: Callable[[int, int], None] | None = None
) -> FolderFeatures:
    """Return the features of a folder's images; encode only images that are not in the store.

    Args:
        opened: its model is loaded only if an image has to be encoded.
        folder: searched with all subfolders.
        store: source of known vectors; new vectors are added to it.
        progress: called with (images done, images to encode).

    Raises:
        ValueError: the folder does not exist, or it contains no image or no readable image.
    """
    names = list_images(folder)
    key_of = hash_files(folder, names)
    vectors = store.load(set(key_of.values()))
    missing = {key: name for name, key in reversed(key_of.items()) if key not in vectors}
    waiting: dict[str, Vectors] = {}
    done = 0
    for keys, pixels in _decoded(folder, list(missing.items()), opened):
        spaces = Heads.of(_on_device(opened)).vectors(encode_pixels(_on_device(opened), pixels, "visible"))
        waiting |= dict(zip(keys, np.hstack([spaces["vector"], spaces["vector_base"]]), strict=True))
        done += len(keys)
        if len(waiting) >= SAVED:
            vectors |= waiting
            store.add(waiting)
            waiting = {}
        if progress is not None:
            progress(done, len(missing))
    if waiting:
        vectors |= waiting
        store.add(waiting)
    readable = tuple(name for name in names if key_of.get(name) in vectors)
    if not readable:
        raise ValueError(
            f"--in: expected readable images in {folder}, got {len(names)} that cannot be decoded. Check the files."
        )
    both_ND = np.stack([vectors[key_of[name]] for name in readable])
    return FolderFeatures(
        names=readable,
        vectors_ND=both_ND[:, : both_ND.shape[1] // 2],
        base_vectors_ND=both_ND[:, both_ND.shape[1] // 2 :],
        unreadable=tuple(name for name in names if key_of.get(name) not in vectors),
        encoded=done,
    )


def _decoded(
    folder: Path, files: Sequence[tuple[str, str]], opened: OpenedModel
) -> Iterator[tuple[list[str], npt.NDArray[np.uint8]]]:
    """Decode (key, path) pairs and yield batches of (keys, (B, H, W, 3) uint8); skip invalid images."""
    keys: list[str] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    for key, name in files:
        try:
            pixels.append(_pixels((folder / name).read_bytes(), opened, name))
        except (ValueError, OSError):
            continue
        keys.append(key)
        if len(keys) == BATCH:
            yield keys, np.stack(pixels)
            keys, pixels = [], []
    if keys:
        yield keys, np.stack(pixels)


def encode_query(
    opened: OpenedModel, images: Sequence[Path], sentence: str | None, infrared_caption: str | None
) -> dict[str, Tensor]:
    """Return the query's unit vectors as `query.query_parts` does; several images are averaged.

    Raises:
        ValueError: there is neither an image nor a sentence, an image is unreadable, or there is a sentence and the
            model has no text tower.
    """
    if not images and not sentence:
        raise ValueError("query: expected an infrared image, a sentence, or both, got neither. Give --image or --text.")
    model = _on_device(opened)
    device = next(model.parameters()).device
    if sentence and model.text is None:
        raise ValueError(
            f"--text: expected a model with a text tower, got {opened.path}, which is from the base stage. "
            "Use only --image, or a model from the text stage."
        )
    infrared_D = text_D = filter_D = None
    if images:
        pixels = [_pixels(_content(path), opened, f"--image {path}") for path in images]
        infrared_D = torch.from_numpy(encode_pixels(model, np.stack(pixels), "infrared")).to(device).mean(dim=0)
    if sentence:
        filtered = bool(images and infrared_caption and opened.config.loss.filter_text)
        texts = [sentence, *([infrared_caption] if filtered and infrared_caption else [])]
        encoded = torch.from_numpy(encode_texts(model, texts)).to(device)
        text_D, filter_D = encoded[0], encoded[1] if filtered else None
    return query_parts(model, infrared_D, text_D, filter_D)


def _pixels(content: bytes, opened: OpenedModel, name: str) -> npt.NDArray[np.uint8]:
    return decode(
        content, height=opened.height, width=opened.width, name=name, depth_range=opened.config.data.depth_range
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"--image: expected an image file, got {path} ({error.strerror}). Check the path.") from None


def _query(
    opened: OpenedModel, images: Sequence[Path], sentence: str | None, infrared_caption: str | None, store: Store
) -> tuple[dict[str, Tensor], str]:
    """Return the vectors of `encode_query` and the key to store them under; the key is "" if the store has them."""
    asked = (*(hashlib.sha256(_content(path)).hexdigest() for path in images), sentence, infrared_caption)
    key = hashlib.sha256(json.dumps([opened.config.loss.filter_text, *asked]).encode()).hexdigest()
    stored = store.load({f"{key}/{name}" for name in ("infrared", "text", "fusion")})
    if stored:
        return {name.rpartition("/")[2]: torch.tensor(vector_D) for name, vector_D in stored.items()}, ""
    return encode_query(opened, images, sentence, infrared_caption), key


def _on_device(opened: OpenedModel) -> TVILFM:
    return opened.model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def rank(parts: Mapping[str, Tensor], features: FolderFeatures, ensemble: EnsembleWeights, count: int) -> list[Found]:
    """Rank the images of a folder; ties are in the order of their paths.

    Infrared alone is compared through the base stage's head, everything else through the current head.

    Args:
        parts: result of `encode_query`.
        features: features of the folder.
        ensemble: weights of the modalities and the temperature of their votes; ignored with one modality.
        count: number of rows to return, at least 1.

    Source: METHOD 7. Differs: as `evaluation.evaluator`.
    """
    if count < 1:
        raise ValueError(f"-k: expected 1 or more, got {count}.")
    alone = set(parts) == {"infrared"}
    gallery_ND = torch.from_numpy(features.base_vectors_ND if alone else features.vectors_ND)
    votes = {name: similarity(vector_D[None], gallery_ND) for name, vector_D in parts.items()}
    if len(parts) == 1:
        weights = dict.fromkeys(parts, 1.0)
        score_N = next(iter(votes.values()))[0]
    else:
        weights = {name: weight for name, weight in ensemble.weights.items() if weight > 0 and name in parts}
        if ensemble.temperature is None:
            vectors_1D = ensemble_query({name: vector_D[None] for name, vector_D in parts.items()}, weights)
            score_N = similarity(vectors_1D, gallery_ND)[0]
        else:
            votes = {name: (vote / ensemble.temperature).softmax(dim=1) for name, vote in votes.items()}
            score_N = ensemble_query(votes, weights)[0]
    best_K = np.argsort(-score_N.numpy(), kind="stable")[:count].tolist()
    return [
        Found(
            rank=place + 1,
            path=features.names[row],
            score=float(score_N[row]),
            shares={name: weight * float(votes[name][0, row]) for name, weight in weights.items()},
        )
        for place, row in enumerate(best_K)
    ]


def remarks(opened: OpenedModel, features: FolderFeatures, *, fused: bool, infrared_caption: str | None) -> list[str]:
    """Return remarks that help to interpret the ranking, each one or more sentences."""
    lines = list(opened.reported)
    if features.unreadable:
        shown = ", ".join(map(printable, features.unreadable[:NAMED]))
        more = len(features.unreadable) - NAMED
        rest = f" and {more} more" if more > 0 else ""
        lines.append(f"{len(features.unreadable)} unreadable images were skipped: {shown}{rest}.")
    if fused and not opened.config.loss.filter_text:
        if infrared_caption:
            lines.append("--infrared-caption has no effect: this model was trained without the filter (SFF).")
    elif fused and not infrared_caption:
        lines.append(
            "No --infrared-caption: what the infrared image already shows (coat, bag) is not subtracted from the "
            "sentence. So it counts twice in the fusion, and colours count less than in the evaluation. Describe in "
            "--infrared-caption what the infrared image shows, without colours."
        )
    elif infrared_caption and not fused:
        lines.append("--infrared-caption has no effect: it is used only with both --image and --text.")
    if opened.config.evaluate.rerank.method != "none":
        lines.append(f"The run's re-ranking ({opened.config.evaluate.rerank.method}) is not applied.")
    return lines


def find(
    opened: OpenedModel,
    folder: Path,
    *,
    images: Sequence[Path] = (),
    sentence: str | None = None,
    infrared_caption: str | None = None,
    count: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Found], list[str]]:
    """Rank the images of a folder by their similarity to a person.

    Args:
        opened: the model; loaded only if something has to be encoded, and moved to the GPU if there is one.
        folder: folder of visible images.
        images: infrared images of the person.
        sentence: a description of the person.
        infrared_caption: what the infrared images show, which fusion subtracts from the sentence.
        count: number of rows to return.
        progress: called with (images done, images to encode).

    Returns:
        The ranking, best first, and remarks about it.

    Raises:
        ValueError: the input is invalid.
    """
    list_images(folder)
    if count < 1:
        raise ValueError(f"-k: expected 1 or more, got {count}.")
    space = f"{model_fingerprint(opened.path)}-{opened.height}x{opened.width}-{DECODING}"
    if opened.config.data.depth_range is not None:
        space += f"-{opened.config.data.depth_range}"
    gallery, queries = (Store(store_folders(opened), f"{space}/{kind}") for kind in ("gallery", "queries"))
    parts, new_key = _query(opened, images, sentence, infrared_caption, queries)
    features = folder_features(opened, folder, gallery, progress=progress)
    if new_key:
        queries.add({f"{new_key}/{name}": vector_D.numpy() for name, vector_D in parts.items()})
    ranking = rank(parts, features, opened.config.evaluate.ensemble, count)
    lines = remarks(opened, features, fused=len(parts) > 1, infrared_caption=infrared_caption)
    if any(is_cut(text) for text in (sentence, infrared_caption) if text):
        lines.append(f"The text is longer than {CONTEXT} tokens. Its end was not read: put what matters first.")
    return ranking, lines
