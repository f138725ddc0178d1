"""Extract features on a pool of Ray Data actors: of test images and texts, and of augmented training views.

Work is cut into fixed chunks before it is handed out, so neither the number of actors nor their speed changes what is
computed together, and the features equal, row for row, those of the plain call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from cluster.depot import Depot, fetched
from cluster.progress import ProgressFile
from tvilfm.config import ClusterSection
from tvilfm.datasets.pixels import open_pixels
from tvilfm.datasets.transforms import Recipe, draw
from tvilfm.evaluation.extract import encode_pixels, encode_texts
from tvilfm.evaluation.features import FeatureTable
from tvilfm.models import TVILFM


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Work of one actor call: some rows of the pixel array, or some sentences.

    Attributes:
        target: which output the vectors belong to.
        start: their first row in it.
        rows: pixel rows; empty for texts.
        texts: sentences; empty for images.
        modality: visible, infrared or text.
        recipe: augmentation recipe; empty = none.
        view: number of the augmented view, part of its seed.
    """

    target: str
    start: int
    modality: str
    rows: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    recipe: str = ""
    view: int = 0


class Encoder:
    """Actor: loads the model once, then encodes chunks."""

    def __init__(self, model: Path, pixels: Path, pad: int, seed: int, cuda: bool, depot: Depot | None = None) -> None:
        self._model = TVILFM.from_pretrained(fetched(model, depot)).to("cuda" if cuda else "cpu").eval()
        self._pixels = open_pixels(fetched(pixels, depot))
        self._pad, self._seed = pad, seed

    def __call__(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        (chunk,) = (Chunk(**item) for item in batch["chunk"])
        vectors = self.encode(chunk)
        count = len(vectors)
        return {
            "target": np.array([chunk.target] * count),
            "index": chunk.start + np.arange(count),
            "vector": vectors,
        }

    def encode(self, chunk: Chunk) -> npt.NDArray[np.float32]:
        """(N, D) raw features of a chunk."""
        if chunk.modality == "text":
            return encode_texts(self._model, chunk.texts, batch=len(chunk.texts))
        pixels = self._pixels[list(chunk.rows)]
        if not chunk.recipe:
            return encode_pixels(self._model, pixels, chunk.modality)
        _, height, width, _ = self._pixels.shape
        rng = np.random.default_rng([self._seed, 13, chunk.view, chunk.start])
        recipe: Recipe = chunk.recipe  # type: ignore[assignment]
        draws = draw(recipe, len(pixels), rng, height=height, width=width, pad=self._pad)
        return encode_pixels(self._model, pixels, chunk.modality, draws=draws, pad=self._pad)


def image_chunks(
    target: str, rows: Sequence[int], modality: str, *, size: int, recipe: str = "", view: int = 0
) -> list[Chunk]:
    """Cut pixel rows into chunks of a size; the vectors' rows in `target` follow the order of `rows`."""
    return [
        Chunk(
            target=target,
            start=start,
            modality=modality,
            rows=tuple(int(row) for row in rows[start : start + size]),
            recipe=recipe,
            view=view,
        )
        for start in range(0, len(rows), size)
    ]


def text_chunks(target: str, texts: Sequence[str], *, size: int) -> list[Chunk]:
    """Cut sentences into chunks of a size."""
    return [
        Chunk(target=target, start=start, modality="text", texts=tuple(texts[start : start + size]))
        for start in range(0, len(texts), size)
    ]


def encode_chunks(
    chunks: Sequence[Chunk],
    *,
    model: Path,
    pixels: Path,
    pad: int,
    seed: int,
    section: ClusterSection,
    progress: ProgressFile,
    depot: Depot | None = None,
) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Encode chunks on an actor pool.

    Args:
        chunks: the work.
        model: folder of `save_pretrained`.
        pixels: the array that chunks' rows refer to.
        pad: augmentation border, pixels.
        seed: of the run.
        section: pool size and GPUs.
        progress: told of encoded rows.
        depot: where workers find model and pixels that are not on their machine.

    Yields:
        Target, rows within it, vectors; in whatever order they come.
    """
    total = sum(len(chunk.rows) + len(chunk.texts) for chunk in chunks)
    dataset = ray.data.from_items([{"chunk": vars(chunk)} for chunk in chunks], override_num_blocks=len(chunks))
    encoded = dataset.map_batches(
        Encoder,
        fn_constructor_kwargs={
            "model": model,
            "pixels": pixels,
            "pad": pad,
            "seed": seed,
            "cuda": section.gpus_per_worker > 0,
            "depot": depot,
        },
        batch_size=1,
        num_cpus=1,
        num_gpus=section.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(section.extract_workers, len(chunks))),
    )
    done = 0
    for batch in encoded.iter_batches(batch_size=None):
        targets = batch["target"]
        for target in np.unique(targets):
            of_target = targets == target
            yield str(target), batch["index"][of_target], batch["vector"][of_target]
        done += len(targets)
        progress.update(done, total)


def write_views(
    folder: Path,
    rows: Mapping[Recipe, Sequence[int]],
    num_views: int,
    *,
    chunk_size: int,
    **pool: Any,
) -> None:
    """Write `<recipe>.npy`, float32 (V, N, D): raw features of augmented views of every training image.

    Args:
        folder: where to.
        rows: recipe -> pixel rows of its modality's training images.
        num_views: V.
        chunk_size: images encoded together.
        pool: see `encode_chunks`.
    """
    chunks = [
        chunk
        for recipe, pixel_rows in rows.items()
        for view in range(num_views)
        for chunk in image_chunks(
            f"{recipe}/{view}",
            pixel_rows,
            "infrared" if recipe == "infrared" else "visible",
            size=chunk_size,
            recipe=recipe,
            view=view,
        )
    ]
    dim = TVILFM.from_pretrained(pool["model"]).spec.dim
    arrays = {
        recipe: np.lib.format.open_memmap(
            folder / f"{recipe}.npy", mode="w+", dtype=np.float32, shape=(num_views, len(pixel_rows), dim)
        )
        for recipe, pixel_rows in rows.items()
    }
    progress = ProgressFile(folder / "progress.json")
    for target, index, vectors in encode_chunks(chunks, progress=progress, **pool):
        recipe, view = target.split("/")
        arrays[recipe][int(view), index] = vectors  # type: ignore[index]
    for array in arrays.values():
        array.flush()


def write_features(
    folder: Path,
    images: Mapping[str, tuple[Sequence[str], Sequence[int]]],
    texts: Sequence[str],
    *,
    chunk_size: int,
    **pool: Any,
) -> None:
    """Write `images.parquet` and `texts.parquet`: raw features of test images and of the sentences they meet.

    Args:
        folder: where to.
        images: modality -> image names and their pixel rows.
        texts: sentences; none for a model without text tower.
        chunk_size: images or sentences encoded together.
        pool: see `encode_chunks`.
    """
    sizes = {modality: len(names) for modality, (names, _) in images.items()} | {"text": len(texts)}
    chunks = [
        chunk
        for modality, (_, rows) in images.items()
        for chunk in image_chunks(modality, rows, modality, size=chunk_size)
    ]
    chunks += text_chunks("text", texts, size=chunk_size)
    dim = TVILFM.from_pretrained(pool["model"]).spec.dim
    vectors = {target: np.empty((size, dim), dtype=np.float32) for target, size in sizes.items()}
    for target, index, part in encode_chunks(chunks, progress=ProgressFile(folder / "progress.json"), **pool):
        vectors[target][index] = part
    names = tuple(name for modality in images for name in images[modality][0])
    FeatureTable(keys=names, vectors_ND=np.concatenate([vectors[modality] for modality in images])).write(
        folder / "images.parquet"
    )
    if texts:
        FeatureTable(keys=tuple(texts), vectors_ND=vectors["text"]).write(folder / "texts.parquet")
