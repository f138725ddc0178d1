"""Encode a client's query (infrared crop, sentence, or both) into search vectors.

A query with both is fused. Fusion subtracts a filter text: a caption of what the infrared image already shows
(METHOD 2). The client may send this caption. Otherwise the service's captioner writes it. Without either, nothing is
subtracted. The answer says which of the three applied.

Shapes: Q questions, N rows, D feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tvilfm.data.images import Pixels, resized
from tvilfm.data.tokens import is_cut
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.models.fusion import semantic_filtered_fusion
from tvilfm.retrieval.spaces import space_id
from tvilfm.retrieval.store import GalleryStore
from tvilfm.terms import FilterTextSource


@dataclass(frozen=True, kw_only=True)
class Question:
    """A client's query before encoding: an infrared image, a sentence, or both.

    Attributes:
        infrared: uint8 (H, W, 3) of any size, one channel repeated.
        sentence: description of the person.
        infrared_caption: what the infrared image shows; used only when an image and a sentence are fused.
    """

    infrared: Pixels | None = None
    sentence: str | None = None
    infrared_caption: str | None = None

    def __post_init__(self) -> None:
        if self.infrared is None and not self.sentence:
            raise ValueError("question: expected an infrared image, a sentence, or both, got neither. Give one.")


@dataclass(frozen=True, kw_only=True)
class Query:
    """An encoded question.

    Attributes:
        parts: modality -> (D,) float32 unit vector on the CPU. Keys are `infrared`, `text` and `fusion` if the question
            has an image and a sentence, otherwise only `infrared`, only `text`, or `visible` for an image of the
            gallery.
        base: whether the vectors are compared through the base stage's head; true for infrared alone.
        space_id: space of the model that encoded the question.
        filter_text_source: source of the filter text that fusion subtracts; "none" also if nothing is fused.
        filter_text: the filter text; None = nothing is subtracted.
        sentence_cut: whether the text tower did not read the end of the sentence or of the given caption.
    """

    parts: Mapping[str, Tensor]
    base: bool
    space_id: str
    filter_text_source: FilterTextSource
    filter_text: str | None = None
    sentence_cut: bool = False


def query_like(gallery: GalleryStore, id: str) -> Query | None:
    """Return a query for images similar to a row of a gallery, or None if the row does not exist."""
    vector_D = gallery.vector(id)
    if vector_D is None:
        return None
    parts = {"visible": torch.from_numpy(vector_D.copy())}
    return Query(parts=parts, base=False, space_id=gallery.space_id, filter_text_source="none")


@torch.inference_mode()
def query_parts(
    model: TVILFM, infrared_D: Tensor | None, text_D: Tensor | None, filter_D: Tensor | None
) -> dict[str, Tensor]:
    """Return the unit vectors that a question is compared by.

    Args:
        model: in eval mode.
        infrared_D: raw feature of the infrared image; None without an image.
        text_D: raw feature of the sentence; None without a sentence.
        filter_D: raw feature of the filter text; None = fusion subtracts nothing.

    Returns:
        Modality -> (D,) float32 on the CPU, see `Query.parts`.
    """
    if text_D is None:
        assert infrared_D is not None
        return {"infrared": model.embed_base(infrared_D[None])[0].cpu()}
    if infrared_D is None:
        return {"text": model.embed(text_D[None])[0].cpu()}
    infrared_D = model.current(infrared_D)
    fusion_D = semantic_filtered_fusion(infrared_D, text_D, filter_D)
    unit = model.embed(torch.stack([infrared_D, text_D, fusion_D])).cpu()
    return dict(zip(("infrared", "text", "fusion"), unit, strict=True))


class QueryEncoder:
    """Encode questions in batches; each gets the same vectors as if encoded alone, up to rounding.

    Args:
        model: in eval mode, on its device.
        height, width: image size in pixels that the model was trained at.
        space: name of the model's spaces; None = a hash of all its weights (`spaces.space_id`).
        filter_text: `loss.filter_text` of the training: True for SFF, False for its ablation (fusion without a filter).
        captioner: function from infrared images (uint8, H x W x 3, original size) to sentences; None = no captioner.
    """

    def __init__(
        self,
        model: TVILFM,
        *,
        height: int,
        width: int,
        space: str | None = None,
        filter_text: bool = True,
        captioner: Callable[[Sequence[Pixels]], Sequence[str]] | None = None,
    ) -> None:
        self._model, self._filter_text, self._captioner = model, filter_text, captioner
        self._size = {"height": height, "width": width}
        self.space_id = space or space_id(model, height=height, width=width)

    def encode(self, questions: Sequence[Question]) -> list[Query]:
        """Return the vectors of the questions, in order. Each image and each distinct sentence is encoded once.

        Raises:
            ValueError: a question has a sentence and the model has no text tower.
        """
        raw_infrared = self._images([one.infrared for one in questions])
        filters = self._filter_texts(questions)
        raw_text = self._texts(
            {one.sentence for one in questions if one.sentence} | {text for text, _ in filters if text}
        )
        queries = []
        for question, raw_D, (filter_text, source) in zip(questions, raw_infrared, filters, strict=True):
            text_D = raw_text[question.sentence] if question.sentence else None
            filter_D = raw_text[filter_text] if filter_text else None
            parts = query_parts(self._model, raw_D, text_D, filter_D)
            base = text_D is None
            cut = any(is_cut(text) for text in (question.sentence, filter_text) if text)
            queries.append(
                Query(
                    parts=parts,
                    base=base,
                    space_id=self.space_id,
                    filter_text_source=source,
                    filter_text=filter_text,
                    sentence_cut=cut,
                )
            )
        return queries

    def _images(self, images: Sequence[Pixels | None]) -> list[Tensor | None]:
        inputs = [resized(image, **self._size) for image in images if image is not None]
        raw = iter(self._raw(encode_pixels(self._model, np.stack(inputs), "infrared")) if inputs else ())
        return [None if image is None else next(raw) for image in images]

    def _texts(self, sentences: set[str]) -> dict[str, Tensor]:
        if not sentences:
            return {}
        if self._model.text is None:
            raise ValueError(
                "sentence: expected none, because the model is from the base stage and has no text tower, got one."
            )
        ordered = sorted(sentences)
        return dict(zip(ordered, self._raw(encode_texts(self._model, ordered)), strict=True))

    def _raw(self, features_ND: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(features_ND).to(next(self._model.parameters()).device)

    def _filter_texts(self, questions: Sequence[Question]) -> list[tuple[str | None, FilterTextSource]]:
        """Return the filter text of each question and the source of that text."""
        filters: list[tuple[str | None, FilterTextSource]] = [(None, "none")] * len(questions)
        silent, images = [], []
        for row, question in enumerate(questions):
            if not self._filter_text or question.infrared is None or not question.sentence:
                continue
            if question.infrared_caption:
                filters[row] = (question.infrared_caption, "given")
            else:
                silent.append(row)
                images.append(question.infrared)
        if self._captioner is not None and silent:
            for row, text in zip(silent, self._captioner(images), strict=True):
                if text:
                    filters[row] = (text, "captioner")
        return filters
