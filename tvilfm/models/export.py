"""Export a model for use without this package: ONNX, TorchScript, safetensors, or a hub folder.

A model is exported in parts, because a search combines them. The image encoders and the text tower return raw features.
`head` maps raw features of any modality to unit vectors; `base_head` does so for infrared queries without text. A
fusion query is `head(infrared + text(sentence) - text(infrared caption))`.

Shapes: B inputs, D feature, L = 77 tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvilfm.models.opening import SETTINGS_FILE, OpenedModel
from tvilfm.models.text_encoder import CONTEXT_LENGTH, VOCABULARY
from tvilfm.models.tvilfm import TVILFM

Format = Literal["onnx", "torchscript", "safetensors", "hub-folder"]
BATCHES = (1, 3)  # batch sizes at which exported parts are compared with the model
EXAMPLE = 2  # batch size of the example input; differs from `BATCHES` to check that the batch size stays dynamic
CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Comparison of an exported part with the model, over inputs of all `BATCHES`.

    Attributes:
        part: visible, infrared, text, head or base_head.
        cosine: lowest cosine similarity between an exported output and the model's output.
        difference: largest absolute difference, divided by the largest absolute value of the model's outputs.
    """

    part: str
    cosine: float
    difference: float


class _Part(nn.Module):
    """One method of the model as a module."""

    def __init__(self, model: TVILFM, call: Callable[[TVILFM, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Tensor) -> Tensor:
        return self.call(self.model, inputs)


@dataclass(frozen=True)
class _Export:
    module: nn.Module
    inputs: Callable[[int], Tensor]  # batch size -> inputs


def export_model(opened: OpenedModel, folder: Path, kind: Format) -> list[Parity]:
    """Write a model and its card to a new folder, and compare the written files with the model.

    Args:
        opened: the model and its settings.
        folder: must not exist.
        kind: `onnx` and `torchscript` write one file per part; `safetensors` and `hub-folder` write a folder for
            `TVILFM.from_pretrained`.

    Returns:
        One comparison per part.

    Raises:
        ValueError: the folder exists, or a required package is missing.
    """
    assert kind in get_args(Format)
    if folder.exists():
        raise ValueError(f"--out: expected a folder that does not exist, got {folder}. Choose another or remove it.")
    if kind == "onnx":
        _require_onnx()
    folder.mkdir(parents=True)
    parts = dict(_parts(opened))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters use deprecated parts of torch
        run = _write(opened, parts, folder, kind)
    (folder / SETTINGS_FILE).write_text(json.dumps(opened.settings, indent=2))
    parity = [_compare(name, part, run[name]) for name, part in parts.items()]
    (folder / CARD_FILE).write_text(model_card(opened, kind, parity))
    return parity


def _write(
    opened: OpenedModel, parts: Mapping[str, _Export], folder: Path, kind: Format
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Write the files, and return one function per part that runs it from its file."""
    if kind in ("onnx", "torchscript"):
        write = _write_onnx if kind == "onnx" else _write_torchscript
        return {name: write(part, folder / name) for name, part in parts.items()}
    opened.model.save_pretrained(folder)
    again = replace(opened, load=partial(TVILFM.from_pretrained, folder))
    return {name: part.module for name, part in _parts(again)}


def _parts(opened: OpenedModel) -> Iterator[tuple[str, _Export]]:
    model = opened.model
    generator = torch.Generator().manual_seed(0)
    size = (3, opened.height, opened.width)

    def images(count: int) -> Tensor:
        return torch.randn((count, *size), generator=generator)

    def tokens(count: int) -> Tensor:
        ids = torch.randint(1, VOCABULARY - 2, (count, CONTEXT_LENGTH), generator=generator)
        ids[:, -1] = VOCABULARY - 1  # end of text
        return ids

    def raw(count: int) -> Tensor:
        return torch.randn((count, model.spec.image_dim), generator=generator)

    yield "visible", _Export(_Part(model, TVILFM.encode_visible), images)
    yield "infrared", _Export(_Part(model, TVILFM.encode_infrared), images)
    if model.text is not None:
        yield "text", _Export(_Part(model, TVILFM.encode_text), tokens)
    yield "head", _Export(_Part(model, TVILFM.embed), raw)
    yield "base_head", _Export(_Part(model, TVILFM.embed_base), raw)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--to onnx: expected the packages onnx, onnxscript and onnxruntime, got no {error.name}. "
            "Install them with pip install 'tvilfm[export]'."
        ) from None


def _write_onnx(part: _Export, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    program = torch.onnx.export(
        part.module.eval(),
        (part.inputs(EXAMPLE),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["inputs"],
        output_names=["outputs"],
        verbose=False,
    )
    assert program is not None
    program.save(path.with_suffix(".onnx"))
    session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0])


def _write_torchscript(part: _Export, path: Path) -> Callable[[Tensor], Tensor]:
    with torch.inference_mode():
        torch.jit.trace(part.module.eval(), (part.inputs(EXAMPLE),)).save(str(path.with_suffix(".pt")))  # type: ignore[no-untyped-call]
    script: Callable[[Tensor], Tensor] = torch.jit.load(str(path.with_suffix(".pt")))  # type: ignore[no-untyped-call]
    return script


@torch.inference_mode()
def _compare(name: str, part: _Export, run: Callable[[Tensor], Tensor]) -> Parity:
    inputs = [part.inputs(count) for count in BATCHES]
    expected = torch.cat([part.module(one) for one in inputs])
    outputs = torch.cat([run(one) for one in inputs])
    return Parity(
        part=name,
        cosine=float(F.cosine_similarity(outputs, expected).min()),
        difference=float((outputs - expected).abs().max() / expected.abs().max()),
    )


def model_card(opened: OpenedModel, kind: Format, parity: list[Parity]) -> str:
    """Return the Markdown card of an exported model: description, results, files and prohibited uses."""
    config, settings = opened.config, opened.settings
    lines = [
        "---",
        "license: mit",
        "tags: [person-re-identification, visible-infrared, tvi-lfm]",
        "---",
        "# TVI-LFM model for text-enhanced visible-infrared person re-identification",
        "",
        f"Exported by tvilfm as {kind} from `{opened.path.name}`.",
        "",
        *(f"* {line}" for line in _facts(opened)),
        "",
        "## Results",
        "",
        *_results(opened.path),
        "",
        "## Files",
        "",
        *(_FILES_OF[kind]),
        f"Images: RGB, resized to {settings['height']} x {settings['width']} (height x width, Lanczos), divided by "
        "255, and normalised with ImageNet's mean and standard deviation. Infrared images: repeated to three channels. "
        "Sentences: CLIP tokens, padded with zeros to 77.",
        "",
        "| part | lowest cosine | largest relative difference |",
        "|---|---:|---:|",
        *(f"| {one.part} | {one.cosine:.6f} | {one.difference:.1e} |" for one in parity),
        "",
        "## What it must not be used for",
        "",
        "A ranked list is not an identification: someone is always at the top, even if the person was never recorded. "
        "Do not arrest, refuse or accuse anyone because of a result. Where the law requires that people know they are "
        "recorded, do not search for people who do not. In many places, remote biometric identification in public "
        "spaces is forbidden or requires a court's permission.",
        "",
        f"Code: MIT. The licence of the weights also depends on the training data ({config.data.name}) and on the "
        f"initial weights ({config.model.weights}, {config.model.text.weights}).",
    ]
    return "\n".join(lines) + "\n"


_PARTS = (
    "`visible` and `infrared` take images (B, 3, H, W), and `text` takes tokens (B, 77); all return raw features "
    "(B, D). `head` maps raw features to unit vectors; `base_head` does so for infrared queries without text. Fusion: "
    "`head(infrared + text(sentence) - text(infrared caption))`. Similarity: dot product with "
    "`head(visible)` (`base_head(visible)` for infrared queries without text)."
)
_PRETRAINED = "`tvilfm.models.TVILFM.from_pretrained(FOLDER)` and `tvilfm find FOLDER` read this folder."
_FILES_OF: dict[Format, tuple[str, ...]] = {
    "onnx": (f"One `.onnx` file per part. {_PARTS}", ""),
    "torchscript": (f"One `.pt` file per part. {_PARTS}", ""),
    "safetensors": (_PRETRAINED, ""),
    "hub-folder": (_PRETRAINED, ""),
}


def _facts(opened: OpenedModel) -> Iterator[str]:
    config, spec = opened.config, opened.model.spec
    yield f"Network: {spec.backbone}, {spec.dim}-dimensional features, " + (
        f"text tower {spec.text_layers} x {spec.text_width}." if spec.with_text else "no text tower."
    )
    if (opened.path / "run.json").is_file():
        yield f"Training data: {config.data.name}. Fidelity: {config.fidelity}. Seed: {config.run.seed}."
        yield f"Text source of the headline results: {config.evaluate.default_text_source}."
    else:
        yield "Training data, seed and results: not recorded."
    yield from opened.reported


def _results(path: Path) -> Iterator[str]:
    if not (path / "results.json").is_file():
        yield "Not recorded."
        return
    results = json.loads((path / "results.json").read_text())
    yield f"{results['dataset']}, in percent. The text source names who wrote the query's sentence."
    yield ""
    yield "| protocol | query | text source | rank-1 | mAP | mINP |"
    yield "|---|---|---|---:|---:|---:|"
    for row in results["rows"]:
        numbers = " | ".join(f"{100 * np.float64(row[name]):.2f}" for name in ("rank1", "mAP", "mINP"))
        yield f"| {row['protocol']} | {row['query']} | {row['text_source']} | {numbers} |"
