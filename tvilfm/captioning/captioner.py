"""Caption images with any image-to-text model of transformers.

Model families differ in how they take the prompt, whether the answer repeats it, and how images are preprocessed. Chat
models take the prompt as a question through their chat template. Models with a decoder that continues a prompt take the
prompt as the first tokens of the answer. All other models take prompt and image through their own processor. If an
answer begins with its prompt, the prompt is cut off.

Shapes: B images, P tokens of the prompt, L tokens of prompt and answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from tvilfm.captioning.conv_captioner import NAME, register
from tvilfm.config import CaptionerSection

Dtype = Literal["float32", "bfloat16", "float16"]
# Families whose decoder continues the prompt -> name of the model input for the prompt.
CONTINUES = {"blip": "input_ids", "git": "input_ids", "vision-encoder-decoder": "decoder_input_ids"}
# BLIP expects the closing token of a BERT tokenizer, and drops it.
DROPS_LAST = frozenset({"blip"})
# Options of an image processor that keep the aspect ratio or split the image.
NOT_SQUASHED = ("do_center_crop", "do_pad", "do_thumbnail", "do_align_long_axis", "crop_to_patches")


class Captioner:
    """The captioning model of one modality; see `Captioner.load`."""

    def __init__(
        self,
        section: CaptionerSection,
        model: Any,
        processor: Any,
        image_processor: Any,
        tokenizer: Any,
        revision: str,
    ) -> None:
        self.section, self.model, self.tokenizer = section, model, tokenizer
        self._processor, self._image_processor, self._revision = processor, image_processor, revision
        # With left padding, all answers of a batch begin in the same column.
        tokenizer.padding_side = "left"
        self._family = model.config.model_type

    @classmethod
    def load(cls, section: CaptionerSection, *, device: str = "cpu", dtype: Dtype = "float32") -> Captioner:
        """Load a captioner from a transformers folder or, by name, from the model hub.

        Args:
            section: model and generation settings.
            device: device to run on.
            dtype: type of the weights on CUDA; a CPU always computes in float32.

        Raises:
            ValueError: the model is neither a folder nor available on the hub, is not an image-to-text model, or has
                too few positions for `max_new_tokens`.
        """
        if section.model == NAME:
            raise ValueError(
                f"model: expected a trained captioner, got {NAME}, which is untrained. Run tvilfm caption-train and "
                "set this to its output folder."
            )
        register()
        logging.disable_progress_bar()
        name, revision = section.model, section.revision
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                name, revision=revision, dtype=torch.float32 if device == "cpu" else getattr(torch, dtype)
            )
            processor = image_processor = None
            if config.model_type in CONTINUES:
                image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
                tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            else:
                processor = AutoProcessor.from_pretrained(name, revision=revision)
                image_processor, tokenizer = processor.image_processor, processor.tokenizer
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model: expected a transformers image-to-text model, by name or folder, got {name} "
                f"({str(error).splitlines()[0]}). Without internet access, download its files elsewhere and use their "
                "folder, or train a captioner here: tvilfm caption-train with model=conv."
            ) from None
        positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is not None and section.max_new_tokens >= positions:
            raise ValueError(
                f"max_new_tokens: expected fewer than the {positions} positions of {name}, got "
                f"{section.max_new_tokens}. Lower it."
            )
        revision = _weights_hash(Path(name)) if Path(name).is_dir() else config._commit_hash
        return cls(section, model.to(device).eval(), processor, image_processor, tokenizer, revision or "")

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width to which the model resizes every image; None if it keeps the aspect ratio.

        A caller may resize images to this size first, so that they are cheaper to transfer.
        """
        processor = self._image_processor
        chat = self._processor is not None and self._processor.chat_template
        if chat or not processor.do_resize or any(getattr(processor, switch, False) for switch in NOT_SQUASHED):
            return None
        size = dict(processor.size)
        return (size["height"], size["width"]) if size.get("height") and size.get("width") else None

    @property
    def provenance(self) -> dict[str, str]:
        """Everything besides the image that affects a sentence: model, revision, prompt hash, and settings as JSON."""
        settings = self.section.model_dump(include={"beams", "temperature", "top_p", "max_new_tokens"})
        settings["dtype"] = str(self.model.dtype).removeprefix("torch.")
        return {
            "model": self.section.model,
            "revision": self._revision,
            "prompt_hash": hashlib.sha256(self.section.prompt.encode()).hexdigest()[:12],
            "settings": json.dumps(settings, sort_keys=True, separators=(",", ":")),
        }

    def caption(self, images: Sequence[npt.NDArray[np.uint8]], *, seed: int = 0) -> list[str]:
        """Caption images.

        Args:
            images: uint8 (H, W, 3) each, of any sizes.
            seed: seed of sampling (`temperature` above 0); the same batch and seed give the same sentences.

        Returns:
            One sentence per image, without the prompt and without surrounding spaces.
        """
        section = self.section
        inputs = self.prompt_inputs(images)
        sampling = section.temperature > 0
        choice: dict[str, object] = {"do_sample": sampling, "num_beams": section.beams}
        if sampling:
            choice |= {"temperature": section.temperature, "top_p": section.top_p, "top_k": 0}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        self.model.eval()
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            answer_BL = self.model.generate(**inputs, max_new_tokens=section.max_new_tokens, **choice)
        prompt_BP = inputs[CONTINUES.get(self._family, "input_ids")]
        if self._family in DROPS_LAST:
            prompt_BP = prompt_BP[:, :-1]
        if torch.equal(answer_BL[:, : prompt_BP.shape[1]], prompt_BP):
            answer_BL = answer_BL[:, prompt_BP.shape[1] :]
        sentences = self.tokenizer.batch_decode(answer_BL, skip_special_tokens=True)
        return [sentence.strip() for sentence in sentences]

    def prompt_inputs(self, images: Sequence[npt.NDArray[np.uint8]]) -> dict[str, Tensor]:
        """Return the model inputs for images and prompt, on the model's device.

        Args:
            images: uint8 (H, W, 3) each, of any sizes.
        """
        pictures = [Image.fromarray(image) for image in images]
        prompt = self.section.prompt
        if self._family in CONTINUES:
            ids_P = self.prompt_ids() + ([self.tokenizer.pad_token_id] if self._family in DROPS_LAST else [])
            inputs = self._image_processor(pictures, return_tensors="pt")
            inputs[CONTINUES[self._family]] = torch.tensor([ids_P] * len(pictures))
        elif self._processor.chat_template:
            ask = [{"type": "text", "text": prompt}] if prompt else []
            talks = [[{"role": "user", "content": [{"type": "image", "image": picture}, *ask]}] for picture in pictures]
            inputs = self._processor.apply_chat_template(
                talks,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        else:
            inputs = self._processor(images=pictures, text=[prompt] * len(pictures), padding=True, return_tensors="pt")
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def prompt_ids(self) -> list[int]:
        """Return the start token and the prompt's tokens, for model families that continue a prompt."""
        start = self.model.generation_config.decoder_start_token_id
        if start is None:
            start = self.model.config.get_text_config(decoder=True).bos_token_id
        return [start, *self.tokenizer(self.section.prompt, add_special_tokens=False)["input_ids"]]

    def save(self, folder: Path) -> None:
        """Write a transformers folder for `load` and `from_pretrained`."""
        self.model.save_pretrained(folder)
        if self._processor is not None:
            self._processor.save_pretrained(folder)
        else:
            self.tokenizer.save_pretrained(folder)
            self._image_processor.save_pretrained(folder)


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
