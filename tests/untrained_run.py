"""A finished run, of a network that nobody trained, and the rankings that its evaluation measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tvilfm.captioning.conv_captioner import build_conv_captioner
from tvilfm.config import Config, load_config, to_yaml
from tvilfm.data.manifest import select
from tvilfm.data.people import with_people
from tvilfm.data.pixels import decode_files
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.evaluation.evaluator import Evaluator
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.evaluation.query_texts import draw_query_texts, sentences_of
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.models.encode import encode_pixels, encode_texts


@dataclass(frozen=True)
class UntrainedRun:
    config: Config
    model: TVILFM
    evaluator: Evaluator
    manifest: pa.Table
    root: Path


@dataclass(frozen=True)
class Ranking:
    """One query, and the gallery images that the evaluation ranks for it, best first."""

    image: bytes
    sentence: str | None
    infrared_caption: str | None
    exclude_cameras: frozenset[str]
    names: list[str]
    shown: frozenset[str]


def draw_statistics(model: TVILFM) -> None:
    """Two heads that differ, as after the text stage."""
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def write_untrained_run(folder: Path, benchmark: Path, *, seed: int = 0) -> UntrainedRun:
    """A run folder as a finished run leaves it; the seed is that of its model."""
    overrides = [f"run.dir={folder}", f"data.root={benchmark}", "evaluate.batch=8", "cluster.extract_workers=1"]
    config = load_config(Path("ray_config.yaml"), overrides, size="tiny")
    torch.manual_seed(seed)
    model = TVILFM(spec_from_config(config.model, 6, with_text=True))
    draw_statistics(model)
    model.eval()
    manifest = read_dataset("synthetic", benchmark)
    manifest = with_people(manifest, {pid: f"p{pid:04}" for pid in manifest["pid"].unique().to_pylist()})
    captions = read_captions(manifest, benchmark, None)
    keys, parts = [], []
    for modality in ("visible", "infrared"):
        names = select(manifest, split=("val", *TEST_SPLITS), modality=modality)["image"].to_pylist()
        pixels = decode_files(benchmark, names, height=config.data.height, width=config.data.width)
        keys += names
        parts.append(encode_pixels(model, pixels, modality))
    query_texts = draw_query_texts(manifest, captions, config.evaluate, seed=0)
    texts = sentences_of(query_texts)
    images = FeatureTable(keys=tuple(keys), vectors_ND=np.concatenate(parts))
    sentences = FeatureTable(keys=tuple(texts), vectors_ND=encode_texts(model, texts))

    made = ("pixels", "text", "features", "captioner_infrared")
    stages = {name: config.run.path / "stages" / f"{name}-0" for name in made}
    for stage in stages.values():
        stage.mkdir(parents=True)
    pq.write_table(manifest, stages["pixels"] / "manifest.parquet")
    model.save_pretrained(stages["text"] / "model")
    images.write(stages["features"] / "images.parquet")
    size = {"height": config.data.height, "width": config.data.width}
    build_conv_captioner(stages["captioner_infrared"] / "captioner", captions["caption"].to_pylist(), **size, seed=0)
    (config.run.path / "config.yaml").write_text(to_yaml(config))
    relative = {name: str(path.relative_to(config.run.path)) for name, path in stages.items()}
    (config.run.path / "run.json").write_text(json.dumps({"stages": relative}))
    evaluator = Evaluator(model, manifest, query_texts, images, sentences, config.evaluate, filter_text=True)
    return UntrainedRun(config=config, model=model, evaluator=evaluator, manifest=manifest, root=benchmark)


def evaluated_rankings(config: Config, evaluator: Evaluator) -> Iterator[Ranking]:
    """Every query of every protocol: infrared alone, and the ensemble with every text source."""
    for name in config.evaluate.protocols:
        protocol = get_protocol(name)
        asking, drawn = evaluator.query(protocol), evaluator.gallery(protocol, 0)
        image_G, camid_G = drawn["image"].to_pylist(), drawn["camid"].to_pylist()
        camids = asking["camid"].to_pylist()
        contents = [(config.data_root / image).read_bytes() for image in asking["image"].to_pylist()]

        def ranking(
            row: int,
            sentence: str | None,
            caption: str | None,
            similarity_G: np.ndarray,
            camids: list[int] = camids,
            contents: list[bytes] = contents,
            image_G: list[str] = image_G,
            camid_G: list[int] = camid_G,
        ) -> Ranking:
            order = np.argsort(-similarity_G, kind="stable")
            return Ranking(
                image=contents[row],
                sentence=sentence,
                infrared_caption=caption,
                exclude_cameras=frozenset(("2",) * (camids[row] == 3)),
                names=[image_G[place] for place in order if not (camids[row] == 3 and camid_G[place] == 2)],
                shown=frozenset(image_G),
            )

        alone_QG = evaluator.similarity(evaluator.image_vectors(asking, base=True), drawn, base=True)(slice(None))
        yield from (ranking(row, None, None, alone_QG[row]) for row in range(len(contents)))
        for source in config.evaluate.text_sources:
            texts = evaluator.texts(protocol, source)
            if texts is None:
                continue
            ensemble_QG = evaluator.ensemble_similarity(evaluator.part_vectors(asking, texts), drawn)(slice(None))
            rows = zip(texts.kept, texts.texts, texts.filter_texts, ensemble_QG, strict=True)
            yield from (ranking(*row) for row in rows)
