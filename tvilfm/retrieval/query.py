"""From what a client has of a person to the vectors that are searched with.

An infrared crop, a sentence, or both, of which fusion wants one thing more: a text that says what the infrared image
shows anyway, to be subtracted (METHOD 2). The client may give it; else the service's captioner writes it; else fusion
goes without, and the answer says which it was.

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
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.models.fusion import semantic_filtered_fusion
from tvilfm.retrieval.spaces import space_id
from tvilfm.terms import FilterTextSource


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a client has; an image, a sentence, or both.

    Attributes:
        infrared: uint8 (H, W, 3) of any size, one channel repeated.
        sentence: how somebody describes the person.
        infrared_caption: what the infrared image shows; used when there are an image and a sentence to fuse.
    """

    infrared: Pixels | None = None
    sentence: str | None = None
    infrared_caption: str | None = None

    def __post_init__(self) -> None:
        if self.infrared is None and not self.sentence:
            raise ValueError("question: expected an infrared image, a sentence, or both, got neither. Give one.")


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question in vectors.

    Attributes:
        parts: modality -> (D,) float32 unit vector on the CPU. `infrared`, `text` and `fusion` of a question that has
            both, else the one there is.
        base: compared through the base stage's head: infrared alone is.
        space_id: of the model.
        filter_text_source: where the text came from that fusion subtracts; none also where nothing is fused.
    """

    parts: Mapping[str, Tensor]
    base: bool
    space_id: str
    filter_text_source: FilterTextSource


@torch.inference_mode()
def query_parts(
    model: TVILFM, infrared_D: Tensor | None, text_D: Tensor | None, filter_D: Tensor | None
) -> dict[str, Tensor]:
    """The unit vectors that a question is compared by.

    Args:
        model: in eval mode.
        infrared_D: raw feature of the infrared image; None without one.
        text_D: raw feature of the sentence; None without one.
        filter_D: raw feature of the text that fusion subtracts; None fuses without.

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
    """Encodes questions, many at once; each as it would be alone, up to rounding.

    Args:
        model: in eval mode, on its device.
        height, width: pixels that the model was trained at.
        filter_text: `loss.filter_text` of the training: SFF, or fusion without a filter for its ablation.
        captioner: infrared pictures (uint8, H x W x 3, as they came) to sentences; None = there is none.
    """

    def __init__(
        self,
        model: TVILFM,
        *,
        height: int,
        width: int,
        filter_text: bool = True,
        captioner: Callable[[Sequence[Pixels]], Sequence[str]] | None = None,
    ) -> None:
        self._model, self._filter_text, self._captioner = model, filter_text, captioner
        self._size = {"height": height, "width": width}
        self.space_id = space_id(model, height=height, width=width)

    def encode(self, questions: Sequence[Question]) -> list[Query]:
        """The vectors of questions, in their order; an image is encoded once and a sentence once.

        Raises:
            ValueError: a sentence for a model without text tower.
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
            queries.append(Query(parts=parts, base=base, space_id=self.space_id, filter_text_source=source))
        return queries

    def _images(self, images: Sequence[Pixels | None]) -> list[Tensor | None]:
        inputs = [resized(image, **self._size) for image in images if image is not None]
        raw = iter(self._raw(encode_pixels(self._model, np.stack(inputs), "infrared")) if inputs else ())
        return [None if image is None else next(raw) for image in images]

    def _texts(self, sentences: set[str]) -> dict[str, Tensor]:
        if not sentences:
            return {}
        if self._model.text is None:
            raise ValueError("sentence: expected none, as the model is of the base stage, without a text tower.")
        ordered = sorted(sentences)
        return dict(zip(ordered, self._raw(encode_texts(self._model, ordered)), strict=True))

    def _raw(self, features_ND: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(features_ND).to(next(self._model.parameters()).device)

    def _filter_texts(self, questions: Sequence[Question]) -> list[tuple[str | None, FilterTextSource]]:
        """What fusion subtracts of each question, and who said it."""
        found: list[tuple[str | None, FilterTextSource]] = [(None, "none")] * len(questions)
        silent, images = [], []
        for row, question in enumerate(questions):
            if not self._filter_text or question.infrared is None or not question.sentence:
                continue
            if question.infrared_caption:
                found[row] = (question.infrared_caption, "given")
            else:
                silent.append(row)
                images.append(question.infrared)
        if self._captioner is not None and silent:
            for row, text in zip(silent, self._captioner(images), strict=True):
                if text:
                    found[row] = (text, "captioner")
        return found
