"""Extract features of test images, texts and augmented training views on a pool of Ray Data actors.

Work is cut into fixed chunks before it is distributed, so neither the number of actors nor their speed changes which
rows are computed together: the features equal those of a plain call, row for row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from cluster.places.depot import Depot, fetched
from cluster.progress import ProgressFile
from tvilfm.config import ClusterSection
from tvilfm.data.pixels import open_pixels
from tvilfm.data.transforms import Recipe, draw_views
from tvilfm.evaluation.features import IMAGES_FILE, FeatureTable
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels, encode_texts

Images = Mapping[str, tuple[Sequence[str], Sequence[int]]]  # modality -> image names and their pixel rows


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Work of one actor call: some rows of the pixel array, or some sentences.

    Attributes:
        target: name of the output that the vectors belong to.
        start: first row of the vectors in this output.
        rows: pixel rows; empty for texts.
        texts: sentences; empty for images.
        modality: visible, infrared or text.
        recipe: augmentation recipe; empty = none.
        view: number of the augmented view, which is part of its seed.
    """

    target: str
    start: int
    modality: str
    rows: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    recipe: str = ""
    view: int = 0


class Encoder:
    """Actor that loads the model once, then encodes chunks."""

    def __init__(
        self, model: Path, pixels: Path, cuda: bool, pad: int = 0, seed: int = 0, depot: Depot | None = None
    ) -> None:
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
        """Return (N, D) raw features of a chunk."""
        if chunk.modality == "text":
            return encode_texts(self._model, chunk.texts, batch=len(chunk.texts))
        pixels = self._pixels[list(chunk.rows)]
        if not chunk.recipe:
            return encode_pixels(self._model, pixels, chunk.modality)
        _, height, width, _ = self._pixels.shape
        recipe: Recipe = chunk.recipe  # type: ignore[assignment]
        draws = draw_views(
            recipe, chunk.rows, seed=self._seed, view=chunk.view, height=height, width=width, pad=self._pad
        )
        return encode_pixels(self._model, pixels, chunk.modality, draws=draws, pad=self._pad)


def image_chunks(
    target: str, rows: Sequence[int], modality: str, *, size: int, recipe: str = "", view: int = 0
) -> list[Chunk]:
    """Cut pixel rows into chunks of a given size. The order of vectors in `target` is that of `rows`."""
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
    """Cut sentences into chunks of a given size."""
    return [
        Chunk(target=target, start=start, modality="text", texts=tuple(texts[start : start + size]))
        for start in range(0, len(texts), size)
    ]


def encode_chunks(
    chunks: Sequence[Chunk],
    *,
    model: Path,
    pixels: Path,
    section: ClusterSection,
    progress: ProgressFile,
    pad: int = 0,
    seed: int = 0,
    depot: Depot | None = None,
) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Encode chunks on an actor pool.

    Args:
        chunks: the work.
        model: folder of `save_pretrained`.
        pixels: the array that chunks' rows refer to.
        section: pool size and GPUs.
        progress: receives the number of encoded rows.
        pad: augmentation border in pixels, of chunks with a recipe.
        seed: seed of the augmentation.
        depot: copies from which workers fetch a model and pixels that are missing on their machine.

    Yields:
        Target, rows within it, and vectors, in any order.
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
    images: Images,
    *,
    chunk_size: int,
    **pool: Any,
) -> None:
    """Write features of the frozen visual part: of augmented training images, and of evaluated images.

    `<recipe>.npy`, float32 (V, N, D), holds raw features of augmented views of every training image; `IMAGES_FILE`
    holds those of `images`.

    Args:
        folder: output folder.
        rows: recipe -> pixel rows of the training images of its modality.
        num_views: V, the number of views per image.
        images: images to evaluate.
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
    evaluated = _Images(images, dim)
    chunks += evaluated.chunks(chunk_size)
    arrays = {
        recipe: np.lib.format.open_memmap(
            folder / f"{recipe}.npy", mode="w+", dtype=np.float32, shape=(num_views, len(pixel_rows), dim)
        )
        for recipe, pixel_rows in rows.items()
    }
    progress = ProgressFile(folder / "progress.json")
    for target, index, vectors in encode_chunks(chunks, progress=progress, **pool):
        if target in images:
            evaluated.vectors[target][index] = vectors
        else:
            recipe, view = target.split("/")
            arrays[recipe][int(view), index] = vectors  # type: ignore[index]
    for array in arrays.values():
        array.flush()
    evaluated.write(folder)


def write_features(
    folder: Path,
    images: Images,
    texts: Sequence[str],
    *,
    chunk_size: int,
    **pool: Any,
) -> None:
    """Write `IMAGES_FILE` and `texts.parquet`: raw features of test images and of query sentences.

    Args:
        folder: output folder.
        images: images to evaluate; empty if their features already exist.
        texts: sentences; empty for a model without a text tower.
        chunk_size: images or sentences encoded together.
        pool: see `encode_chunks`.
    """
    spec = TVILFM.from_pretrained(pool["model"]).spec
    evaluated = _Images(images, spec.image_dim)
    chunks = evaluated.chunks(chunk_size) + text_chunks("text", texts, size=chunk_size)
    vectors = evaluated.vectors | {"text": np.empty((len(texts), spec.dim), dtype=np.float32)}
    for target, index, part in encode_chunks(chunks, progress=ProgressFile(folder / "progress.json"), **pool):
        vectors[target][index] = part
    if images:
        evaluated.write(folder)
    if texts:
        FeatureTable(keys=tuple(texts), vectors_ND=vectors["text"]).write(folder / "texts.parquet")


class _Images:
    """Images to evaluate, and arrays that collect their features."""

    def __init__(self, images: Images, dim: int) -> None:
        self._images = images
        self.vectors = {
            modality: np.empty((len(names), dim), dtype=np.float32) for modality, (names, _) in images.items()
        }

    def chunks(self, size: int) -> list[Chunk]:
        return [
            chunk
            for modality, (_, rows) in self._images.items()
            for chunk in image_chunks(modality, rows, modality, size=size)
        ]

    def write(self, folder: Path) -> None:
        names = tuple(name for names, _ in self._images.values() for name in names)
        FeatureTable(keys=names, vectors_ND=np.concatenate(list(self.vectors.values()))).write(folder / IMAGES_FILE)
