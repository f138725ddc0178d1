"""Encode images and texts to raw features, in batches.

Shapes: N rows, D feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tvilfm.data.tokens import tokenize
from tvilfm.data.transforms import Draws, augment, normalise
from tvilfm.models import TVILFM
from tvilfm.models.backbone import image_format

Features = npt.NDArray[np.float32]


@torch.inference_mode()
def encode_pixels(
    model: TVILFM,
    pixels_NHW3: npt.NDArray[np.uint8],
    modality: str,
    *,
    draws: Draws | None = None,
    pad: int = 0,
) -> Features:
    """Return raw features of one batch of images.

    Args:
        model: network in eval mode, on the device to use.
        pixels_NHW3: uint8.
        modality: visible or infrared.
        draws: augmentation of this batch, from `transforms.draw`; None = no augmentation (test images).
        pad: augmentation border, pixels.

    Returns:
        (N, D) float32, not normalised.
    """
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_NHW3)).to(device)
    if draws is None:
        images = normalise(pixels.permute(0, 3, 1, 2))
    else:
        images = augment(pixels, draws.to(device), pad=pad)
    images = images.contiguous(memory_format=image_format(device))
    encode = model.encode_visible if modality == "visible" else model.encode_infrared
    features: Features = encode(images).cpu().numpy()
    return features


@torch.inference_mode()
def encode_texts(model: TVILFM, texts: Sequence[str], *, batch: int = 128) -> Features:
    """Return raw features (N, D) float32 of sentences, in their order.

    Each batch is as long as its longest sentence. Sentences are therefore batched by length, which avoids padding
    short sentences to the length of long ones.
    """
    device = next(model.parameters()).device
    order = np.argsort([len(text) for text in texts], kind="stable")
    features = np.empty((len(texts), model.spec.dim), dtype=np.float32)
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        features[rows] = model.encode_text(tokenize([texts[row] for row in rows]).to(device)).cpu().numpy()
    return features
