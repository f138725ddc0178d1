"""A small captioner that trains in two minutes on two CPU cores: a convolutional encoder and two decoder layers.

It is a `VisionEncoderDecoderModel` with a small GPT-2 as decoder, so it is loaded, fine-tuned and used exactly like
BLIP. Only the encoder is our own: with images of about a hundred rows and a few thousand training images, a
convolutional network learns garments and colours in a fraction of a vision transformer's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTImageProcessor,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

NAME = "conv"  # value of `caption.<modality>.model` for a new captioner of this kind
WIDTHS = (32, 64, 96, 128)  # channels; every stage halves height and width
DECODER_LAYERS = 2
DECODER_HEADS = 4
MAX_TOKENS = 128  # positions of the decoder: twice the longest published caption
VOCABULARY = 8192  # most frequent words; others become <unk>
PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


class ConvEncoderConfig(PreTrainedConfig):
    """Configuration of `ConvEncoder`."""

    model_type = "tvilfm_conv_encoder"

    def __init__(self, height: int = 96, width: int = 48, widths: Sequence[int] = WIDTHS, **settings: Any) -> None:
        self.height, self.width, self.widths = height, width, list(widths)
        super().__init__(**settings)

    @property
    def hidden_size(self) -> int:
        return self.widths[-1]


class ConvEncoder(PreTrainedModel):
    """Convolutional encoder with one token per cell of the last feature map, plus a learned position."""

    config_class = ConvEncoderConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__(config)
        layers = [_convolution(3, config.widths[0], size=5, stride=2)]
        for before, after in pairwise(config.widths):
            layers += [_convolution(before, after, size=3, stride=2), _convolution(after, after, size=3, stride=1)]
        self.stages = nn.Sequential(*layers)
        rows, columns = config.height, config.width
        for _ in config.widths:
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        # As large as the cell values, so that the decoder can tell positions (and garments) apart from the first step.
        self.positions = nn.Parameter(torch.randn(rows * columns, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **ignored: object) -> BaseModelOutput:
        """Return the tokens of the feature map.

        Args:
            pixel_values: float (B, 3, H, W), from the folder's image processor.
            ignored: options that `VisionEncoderDecoderModel` passes to every encoder.

        Returns:
            `last_hidden_state` (B, L, D), L cells row by row.
        """
        # Channels last: a fifth faster on CPU.
        cells_BDL = self.stages(pixel_values.contiguous(memory_format=torch.channels_last)).flatten(2)
        return BaseModelOutput(last_hidden_state=self.norm(cells_BDL.mT + self.positions))


def _convolution(before: int, after: int, *, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


def register() -> None:
    """Register the encoder with transformers' Auto classes, so that a saved captioner loads without remote code."""
    AutoConfig.register(ConvEncoderConfig.model_type, ConvEncoderConfig, exist_ok=True)
    AutoModel.register(ConvEncoderConfig, ConvEncoder, exist_ok=True)


def build_conv_captioner(folder: Path, texts: Sequence[str], *, height: int, width: int, seed: int) -> None:
    """Write an untrained captioner: a transformers folder with model, tokenizer and image processor.

    Args:
        folder: folder to write; created if missing.
        texts: training sentences; their words form the vocabulary.
        height: rows of the model's input images; images are resized to this size.
        width: columns of the model's input images.
        seed: seed of the weights.

    Raises:
        ValueError: `texts` is empty.
    """
    if not texts:
        raise ValueError("texts: expected sentences to take the vocabulary from, got none. Caption training images.")
    register()
    logging.disable_progress_bar()
    tokenizer = word_tokenizer(texts)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    encoder = ConvEncoderConfig(height=height, width=width)
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_TOKENS,
        n_embd=encoder.hidden_size,
        n_layer=DECODER_LAYERS,
        n_head=DECODER_HEADS,
        add_cross_attention=True,
        # 1 / sqrt(width) keeps variances. With GPT-2's default of 0.02, such a narrow decoder takes long to use the
        # image.
        initializer_range=encoder.hidden_size**-0.5,
        # No dropout: a few epochs over many sentences do not overfit.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ids,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=ids["bos_token_id"], **ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionEncoderDecoderModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a lower-case tokenizer of whole words and punctuation marks; decoding restores the sentence.

    Args:
        texts: sentences whose words form the vocabulary.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"[.,;:!?]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = [AddedToken(token, special=True) for token in (PAD, START, END, UNKNOWN)]
    trainer = trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, unk_token=UNKNOWN
    )
