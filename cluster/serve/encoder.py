"""Encode queries and visible images, with the queries of several requests in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.places.finished import FinishedRun
from cluster.serve.batching import Batcher, in_model_thread
from cluster.serve.common import in_batches
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.colors import remove_colors
from tvilfm.config import CaptionerSection, Config
from tvilfm.data.images import Pixels, resized
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels
from tvilfm.retrieval.query import Query, QueryEncoder, Question


class Encoder:
    """Encoder of images and sentences, in a replica's process or, if replicas share it, in its own.

    Args:
        config: sections `serve` and `cluster`.
        run: the run whose model is served.
        space: space of that model.
        captioner: see `application.filter_captioner`.
    """

    def __init__(self, config: Config, run: FinishedRun, space: str, captioner: CaptionerSection | None) -> None:
        device = "cuda" if config.cluster.gpus_per_worker > 0 else "cpu"
        self._model = TVILFM.from_pretrained(run.here(run.model), mapped=True).to(device).eval()
        self._captioner = None
        if captioner is not None:
            model = str(run.here(Path(captioner.model)))
            self._captioner = Captioner.load(captioner.model_copy(update={"model": model}), device=device)
        data = run.config.data
        self._size = {"height": data.height, "width": data.width}
        self._encoder = QueryEncoder(
            self._model,
            **self._size,
            space=space,
            filter_text=run.config.loss.filter_text,
            captioner=None if self._captioner is None else self._caption,
        )
        self._batch = config.serve.batch
        self._batched = Batcher(self._encode, size=config.serve.batch)

    async def encode(self, questions: Sequence[Question]) -> list[Query]:
        """Encode questions, with those of other calls in one batch."""
        return await self._batched(questions)

    async def _encode(self, groups: list[Sequence[Question]]) -> list[list[Query]]:
        questions = [question for group in groups for question in group]
        queries = iter(await in_model_thread(in_batches, self._encoder.encode, self._batch, questions))
        return [[next(queries) for _ in group] for group in groups]

    async def ready(self) -> None:
        """Return once the encoder is ready."""

    def _caption(self, pictures: Sequence[Pixels]) -> list[str]:
        """Return captions of infrared images, without colour words."""
        assert self._captioner is not None
        return [remove_colors(sentence) for sentence in self._captioner.caption(pictures)]

    async def caption(self, picture: Pixels) -> str:
        """Return the caption of an infrared image, without color words."""
        (sentence,) = await asyncio.to_thread(self._caption, [picture])
        return sentence

    async def encode_visible(self, pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """Return the raw features of visible images."""
        return await asyncio.to_thread(self._encode_visible, pictures)

    def _encode_visible(self, pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        pixels = np.stack([resized(picture, **self._size) for picture in pictures])
        return encode_pixels(self._model, pixels, "visible")
