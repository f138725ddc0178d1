"""The visual backbone: one stem per modality and four shared layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tvilfm.models.wrappers import unwrapped

logger = logging.getLogger(__name__)


def image_format(device: torch.device) -> torch.memory_format:
    """Return the memory format of images and convolutions.

    This is channels last on CUDA, where it is faster. On a CPU, the contiguous format gives results closer to float64.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a ResNet: torchvision's block and its expansion, blocks per layer, and channels of the stem."""

    block: str
    expansion: int
    depths: tuple[int, int, int, int]
    width: int

    @property
    def dim(self) -> int:
        return self.width * 8 * self.expansion


ARCHITECTURES = {
    "resnet50": Architecture(block="Bottleneck", expansion=4, depths=(3, 4, 6, 3), width=64),
    "resnet18_half": Architecture(block="BasicBlock", expansion=1, depths=(1, 1, 1, 1), width=32),
}


class Stem(nn.Module):
    """conv1, bn1 and maxpool, without a ReLU after bn1, as in the released network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.maxpool(self.bn1(self.conv1(images)))
        return maps


class DualStemResNet(nn.Module):
    """ResNet with one stem for visible images, one for infrared images, and shared layers 1-4; the last stride is 1.

    Source: METHOD 2 (torchvision layout). Differs: none known.
    """

    def __init__(self, name: str) -> None:
        # Imported here because torchvision takes seconds to import, and not every process builds a network.
        from torchvision.models import resnet

        super().__init__()
        architecture = ARCHITECTURES[name]
        block = getattr(resnet, architecture.block)
        self.dim = architecture.dim
        self.visible_stem = Stem(architecture.width)
        self.infrared_stem = Stem(architecture.width)
        in_planes = architecture.width
        for index, depth in enumerate(architecture.depths):
            planes = architecture.width * 2**index
            stride = 2 if index in (1, 2) else 1
            layer, in_planes = _layer(block, in_planes, planes, depth, stride)
            self.add_module(f"layer{index + 1}", layer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, visible: Tensor | None, infrared: Tensor | None) -> Tensor:
        """Return the feature maps of the visible images, followed by those of the infrared images.

        The shared layers see both modalities as one batch, so in training their BN statistics cover both.

        Args:
            visible: (B, 3, H, W) float, normalised as METHOD 4 describes; None without visible images.
            infrared: (B', 3, H, W) float, one channel repeated; None without infrared images.

        Returns:
            (B + B', D, H/16, W/16) feature maps.
        """
        maps = []
        if visible is not None:
            maps.append(self.visible_stem(visible))
        if infrared is not None:
            maps.append(self.infrared_stem(infrared))
        x = torch.cat(maps)
        for index in range(4):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return x


def _layer(block: Any, in_planes: int, planes: int, depth: int, stride: int) -> tuple[nn.Sequential, int]:
    out_planes = planes * block.expansion
    downsample = None
    if stride != 1 or in_planes != out_planes:
        downsample = nn.Sequential(
            nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_planes),
        )
    blocks = [block(in_planes, planes, stride, downsample)]
    blocks += [block(out_planes, planes) for _ in range(depth - 1)]
    return nn.Sequential(*blocks), out_planes


def load_imagenet(backbone: DualStemResNet, name: str, source: str = "imagenet") -> None:
    """Load an ImageNet state dict in torchvision's layout into both stems and the shared layers.

    Args:
        backbone: network to fill in place.
        name: architecture.
        source: `imagenet` (torchvision's own weights, downloaded once) or a local state-dict file.

    Raises:
        ValueError: when the weights cannot be downloaded or read; the message says how to get them.
    """
    if source == "imagenet":
        if name != "resnet50":
            raise ValueError(
                f"model.weights: expected attributes, random or a file for {name}, got imagenet. "
                "torchvision publishes ImageNet weights for resnet50 only."
            )
        from torchvision.models import ResNet50_Weights

        try:
            # The released code starts from torchvision's first resnet50 weights.
            state = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise ValueError(
                f"model.weights: expected to download torchvision's ResNet-50 weights, got {error}. On a machine with "
                "internet access, save torchvision.models.ResNet50_Weights.IMAGENET1K_V1.get_state_dict() with "
                "torch.save, and set model.weights to that file."
            ) from None
    else:
        state = read_state_dict(source, "model.weights")
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    stem_keys = ("conv1.", "bn1.")
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        names = [f"visible_stem.{key}", f"infrared_stem.{key}"] if key.startswith(stem_keys) else [key]
        ours |= {ours_key: value for ours_key in names}
    missing, unexpected = backbone.load_state_dict(ours, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"model.weights: expected a {name} state dict in torchvision's layout, got {source} with missing "
            f"{missing[:3]} and unknown {unexpected[:3]}. Use a matching file."
        )


def read_state_dict(source: str, key: str) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors or torch file without running pickled code.

    Raises:
        ValueError: when the file is missing or is not a state dict.
    """
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{key}: expected a state-dict file, got {source}. Check the path.")
    try:
        if path.suffix == ".safetensors":
            held: Any = dict(load_file(path))
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on invalid bytes, the restricted unpickler can raise any type
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key}: expected a state-dict file, got {source}: {reason}. Save state_dict().") from None
    state, notes = unwrapped(held)
    for note in notes:
        logger.warning("%s: %s: %s", key, source, note)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{key}: expected a plain state dict, got something else in {source}. Save state_dict().")
    return dict(state)
