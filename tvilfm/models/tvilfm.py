"""The whole network, with one public `encode_*` method per modality.

Losses and fusion use raw features; retrieval compares unit vectors. The network keeps a copy of the base stage's GeM
and head, so that infrared-only retrieval does not change while the text stage trains the shared head.

Shapes: B batch, D feature, L tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tvilfm.config import ModelSection, TextModelSection
from tvilfm.files import digest_of_arrays
from tvilfm.models.backbone import ARCHITECTURES, DualStemResNet, load_imagenet
from tvilfm.models.bn_neck import BNNeck
from tvilfm.models.gem import GeMPool
from tvilfm.models.text_encoder import TextEncoder, load_clip_text


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything needed to build the network before its weights are loaded."""

    backbone: str
    num_classes: int
    text_width: int
    text_layers: int
    text_heads: int
    with_text: bool = True
    trained_pool: bool = False

    @property
    def dim(self) -> int:
        """The width D of the heads' input."""
        return ARCHITECTURES[self.backbone].dim

    @property
    def image_dim(self) -> int:
        """The width of a raw image feature: D, or 2 D if the text stage trains the GeM.

        In the second case, images are pooled twice: by the current GeM and by the base stage's GeM.
        """
        return self.dim * (1 + self.trained_pool)


def spec_from_config(model: ModelSection, num_classes: int, *, with_text: bool) -> ModelSpec:
    """Return the spec of the network in a config; without text, the config's tower sizes are ignored."""
    text = model.text if with_text else TextModelSection()
    return ModelSpec(
        backbone=model.backbone,
        num_classes=num_classes,
        text_width=text.width,
        text_layers=text.layers,
        text_heads=text.heads,
        with_text=with_text,
    )


class TVILFM(nn.Module):
    """TVI-LFM: dual-stem backbone, GeM, one BN neck for all modalities, and CLIP's text tower.

    Source: METHOD 2. Differs: none known.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = DualStemResNet(spec.backbone)
        self.pool = GeMPool()
        self.head = BNNeck(spec.dim, spec.num_classes)
        self.text: TextEncoder | None = None
        self.base_pool: GeMPool | None = None
        self.base_head: BNNeck | None = None
        if spec.with_text:
            self._add_text()

    def _add_text(self) -> None:
        spec = self.spec
        self.text = TextEncoder(dim=spec.dim, width=spec.text_width, layers=spec.text_layers, heads=spec.text_heads)
        self.base_pool, self.base_head = copy.deepcopy(self.pool), copy.deepcopy(self.head)

    def start_text_stage(self, text: TextModelSection, *, train_pool: bool = False) -> None:
        """Add a text tower of the given size, and keep a copy of the base stage's GeM and head.

        Args:
            text: size of the tower.
            train_pool: whether the stage trains p of the GeM; see `ModelSpec.image_dim`.
        """
        self.spec = replace(
            self.spec,
            text_width=text.width,
            text_layers=text.layers,
            text_heads=text.heads,
            with_text=True,
            trained_pool=train_pool,
        )
        self._add_text()

    def encode_images(self, visible: Tensor | None, infrared: Tensor | None) -> Tensor:
        """Return raw features (B + B', `spec.image_dim`) float32 of the visible, then the infrared images."""
        maps = self.backbone(visible, infrared)
        raw_BD: Tensor = self.pool(maps)
        if self.spec.trained_pool:
            assert self.base_pool is not None
            return torch.cat([raw_BD, self.base_pool(maps)], dim=1)
        return raw_BD

    def encode_visible(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) normalized float to raw features (B, `spec.image_dim`)."""
        return self.encode_images(images, None)

    def encode_infrared(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) normalized float, one channel repeated, to raw features (B, `spec.image_dim`)."""
        return self.encode_images(None, images)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Map (B, L) token ids to raw features (B, D)."""
        assert self.text is not None, "a base-stage model has no text tower"
        raw_BD: Tensor = self.text(tokens_BL)
        return raw_BD

    def current(self, raw: Tensor) -> Tensor:
        """Return the part (..., D) of raw features (..., `spec.image_dim`) that the current GeM pooled."""
        return raw[..., : self.spec.dim]

    def embed(self, raw: Tensor) -> Tensor:
        """Map raw features of any modality to unit vectors (B, D) through the current head."""
        return self.head.embed(self.current(raw))

    def embed_base(self, raw: Tensor) -> Tensor:
        """Map raw image features (B, `spec.image_dim`) to unit vectors (B, D) with the base stage's GeM and head."""
        head = self.head if self.base_head is None else self.base_head
        return head.embed(raw[..., -self.spec.dim :])

    def embed_visible_only(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) visible images to unit vectors (B, D) through the base stage's GeM and head."""
        return self.embed_base(self.encode_visible(images))

    def embed_infrared_only(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) infrared images to unit vectors (B, D) through the base stage's GeM and head."""
        return self.embed_base(self.encode_infrared(images))

    def visual_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the backbone and the GeM, which the text stage freezes."""
        yield from self.backbone.parameters()
        yield from self.pool.parameters()

    def freeze_visual(self) -> None:
        """Freeze the visual part and the kept copy of the base stage's GeM and head.

        The current GeM stays trainable if the text stage trains it (`ModelSpec.trained_pool`).
        """
        for parameter in self.visual_parameters():
            parameter.requires_grad_(False)
        self.pool.requires_grad_(self.spec.trained_pool)
        for module in (self.base_pool, self.base_head):
            if module is not None:
                module.requires_grad_(False)

    def train_text_stage(self, *, freeze_batch_norm: bool) -> None:
        """Set the head and text tower to train mode; set the backbone to eval mode if BN statistics are frozen."""
        self.train()
        self.backbone.train(not freeze_batch_norm)
        for module in (self.base_pool, self.base_head):
            if module is not None:
                module.eval()

    def save_pretrained(self, folder: Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write `model.safetensors` and `config.json`.

        Args:
            folder: created if missing.
            weights: name -> weights to write in place of the network's own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() | dict(weights or {})
        state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "tvilfm", **asdict(self.spec)}, indent=2))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, mapped: bool = False) -> TVILFM:
        """Read a folder of `save_pretrained`, strictly.

        Args:
            name: local folder, or a repository `owner/model` of the Hugging Face hub or its local cache.
            revision: branch, tag or commit of a repository.
            mapped: whether the weights stay in the file, as pages that all processes of a machine share. The file must
                not be overwritten meanwhile.

        Raises:
            ValueError: there is no such folder or reachable repository, a file is missing, or the weights do not fit
                the config.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = download(str(name), revision)
        config_path, weights_path = folder / "config.json", folder / "model.safetensors"
        for path in (config_path, weights_path):
            if not path.is_file():
                raise ValueError(
                    f"checkpoint: expected a model folder with {path.name}, got none at {path}. "
                    "Use a folder of save_pretrained."
                )
        try:
            values: dict[str, Any] = dict(json.loads(config_path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config_path}: expected a JSON object, got {error}. Restore the file.") from None
        if values.pop("model_type", None) != "tvilfm":
            raise ValueError(f"{config_path}: expected model_type tvilfm. This folder holds another model.")
        try:
            with torch.device("meta"):  # no time for random weights
                model = cls(ModelSpec(**values))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{config_path}: expected a config of save_pretrained, got {error}.") from None
        try:
            weights = load_file(weights_path)
            if not mapped:
                weights = {key: value.clone() for key, value in weights.items()}
            model.load_state_dict(weights, strict=True, assign=True)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{weights_path}: expected the weights of {config_path}, got {error}") from None
        if model.text is not None:
            model.text.tower.attn_mask = model.text.tower.build_causal_mask()  # not a weight
        return model


def download(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a model from the Hugging Face hub or its local cache.

    Raises:
        ValueError: the hub cannot be reached, or it has no such model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "model.safetensors"]))
    except (OSError, ValueError) as error:  # base classes of the hub's own errors
        raise ValueError(
            f"checkpoint: expected a folder of save_pretrained or a repository of the hub, got {name} "
            f"({type(error).__name__}). Check the name. Without internet access, download the model elsewhere and "
            "use its folder."
        ) from None


def load_visual_weights(model: TVILFM, section: ModelSection) -> None:
    """Load the backbone weights that the config names; `random` and `attributes` keep the current weights."""
    if section.weights not in ("random", "attributes"):
        load_imagenet(model.backbone, section.backbone, section.weights)


def load_text_weights(model: TVILFM, section: ModelSection) -> None:
    """Load the text tower weights that the config names; `random` keeps the current weights."""
    assert model.text is not None
    if section.text.weights != "random":
        load_clip_text(model.text, model.spec.dim, section.text.weights)


@torch.no_grad()
def parameter_digest(model: nn.Module) -> str:
    """Return a hash of all weights; equal digests mean equal models."""
    return digest_of_arrays({name: value.detach().cpu().numpy() for name, value in model.state_dict().items()})
