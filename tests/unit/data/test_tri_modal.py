"""Three-modality batches: the union of the workers' batches is the one worker's, whatever each of them holds."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest
from tvilfm.data.pk_sampler import PKBatch
from tvilfm.data.tokens import tokenize
from tvilfm.data.transforms import Draws
from tvilfm.data.tri_modal import RECIPES, Batch, Captions, TrainingRows, TriModalDataset

PIDS = (40, 7, 23, 11, 90)
HEIGHT, WIDTH = 12, 6
WORDS = ("a", "man", "with", "red", "blue", "green", "coat", "long", "hair", "bag", "and", "very", "old", "shoes")


@pytest.fixture(scope="module")
def manifest() -> pa.Table:
    """Five people, two or three pictures a modality; 11 is for validation, 90 for test; rows are shuffled."""
    rows: list[dict[str, object]] = []
    for pid in PIDS:
        for camid, modality in ((1, "visible"), (2, "visible"), (3, "infrared"), (6, "infrared"), (6, "infrared")):
            split = {11: "val", 90: "query" if modality == "infrared" else "gallery"}.get(pid, "train")
            image = f"cam{camid}/{pid:04d}/{len(rows):04d}.jpg"
            rows.append({"image": image, "pid": pid, "camid": camid, "modality": modality, "split": split})
    order = np.random.default_rng(0).permutation(len(rows))
    return build_manifest(rows[i] for i in order)


@pytest.fixture(scope="module")
def captions(manifest: pa.Table) -> pa.Table:
    """Sentences of uneven length; a rephrase starts with "rephrased"."""
    rng = np.random.default_rng(1)
    rows = []
    for image in manifest["image"].to_pylist():
        words = rng.choice(WORDS, int(rng.integers(2, 30)))
        rows.append(
            {
                "image": image,
                "caption": f"{image} {' '.join(words)}",
                "rephrased": f"rephrased {image} {' '.join(words[::-1])}",
            }
        )
    return pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)


@pytest.fixture(scope="module")
def pixels(manifest: pa.Table) -> np.ndarray:
    """Row i of the manifest is a picture filled with i."""
    values = np.arange(manifest.num_rows, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(values, (manifest.num_rows, HEIGHT, WIDTH, 3)).copy()


@pytest.fixture(scope="module")
def rows(manifest: pa.Table) -> TrainingRows:
    return TrainingRows.from_manifest(manifest, use_val=False)


def make_views(rows: TrainingRows, count: int = 3) -> dict[Any, np.ndarray]:
    """Feature (recipe, view, row): the numbers say where they come from."""
    views = {}
    for number, recipe in enumerate(RECIPES):
        table = rows.infrared if recipe == "infrared" else rows.visible
        grid = np.meshgrid([number], np.arange(count), np.arange(table.num_rows), indexing="ij")
        views[recipe] = np.stack([axis[0] for axis in grid], axis=-1).astype(np.float32)
    return views


class Untouchable:
    """Pixels that must not be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"pixels.{name} was read")

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("pixels were read")


def pad_tokens(tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))


def unite(parts: list[Batch]) -> Batch:
    def union(name: str, recipe: Any) -> torch.Tensor:
        return torch.cat([getattr(part, name)[recipe] for part in parts])

    draws = {
        recipe: Draws(**{f.name: torch.cat([getattr(p.draws[recipe], f.name) for p in parts]) for f in fields(Draws)})
        for recipe in parts[0].draws
    }
    with_text = parts[0].tokens is not None
    return Batch(
        labels=torch.cat([part.labels for part in parts]),
        pixels={recipe: union("pixels", recipe) for recipe in parts[0].pixels},
        draws=draws,
        features={recipe: union("features", recipe) for recipe in parts[0].features},
        tokens=torch.cat([pad_tokens(part.tokens) for part in parts]) if with_text else None,  # type: ignore[arg-type]
        filter_tokens=torch.cat([pad_tokens(part.filter_tokens) for part in parts]) if with_text else None,  # type: ignore[arg-type]
    )


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.labels, second.labels)
    assert list(first.pixels) == list(second.pixels) and list(first.features) == list(second.features)
    for recipe in first.pixels:
        assert torch.equal(first.pixels[recipe], second.pixels[recipe])
        for field in fields(Draws):
            assert torch.equal(getattr(first.draws[recipe], field.name), getattr(second.draws[recipe], field.name))
    for recipe in first.features:
        assert torch.equal(first.features[recipe], second.features[recipe])
    for name in ("tokens", "filter_tokens"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(pad_tokens(one), pad_tokens(other))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_the_union_of_the_workers_batches_is_the_batch_of_one_worker(
    manifest: pa.Table,
    captions: pa.Table,
    pixels: np.ndarray,
    world_size: int,
    with_text: bool,
    cached: bool,
) -> None:
    rows = TrainingRows.from_manifest(manifest, use_val=True)

    def dataset(rank: int, world_size: int) -> TriModalDataset:
        return TriModalDataset(
            rows,
            manifest,
            pixels,
            pad=2,
            seed=3,
            rank=rank,
            world_size=world_size,
            captions=captions if with_text else None,
            llm_probability=0.5,
            views=make_views(rows) if cached else None,
        )

    whole, parts = dataset(0, 1), [dataset(rank, world_size) for rank in range(world_size)]
    sampler = rows.sampler(4, 2, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in sampler:
            assert_same(whole[batch], unite([part[batch] for part in parts]))
            assert len(parts[0][batch].labels) == 8 // world_size


def test_rows_of_a_batch_show_the_identity_of_their_label(
    manifest: pa.Table, pixels: np.ndarray, rows: TrainingRows
) -> None:
    dataset = TriModalDataset(rows, manifest, pixels, pad=2, seed=0)
    pids = manifest["pid"].to_pylist()
    modalities = manifest["modality"].to_pylist()
    for batch in rows.sampler(3, 2, seed=0):
        found = dataset[batch]
        assert found.features == {} and found.tokens is None
        for recipe in RECIPES:
            assert found.pixels[recipe].dtype == torch.uint8
            shown = found.pixels[recipe][:, 0, 0, 0].tolist()
            assert [sorted({7, 23, 40}).index(pids[row]) for row in shown] == found.labels.tolist()
            assert {modalities[row] for row in shown} == {"infrared" if recipe == "infrared" else "visible"}
        assert torch.equal(found.pixels["visible"], found.pixels["visible_augmented"])


def test_draws_differ_by_recipe_epoch_batch_and_seed(
    manifest: pa.Table, pixels: np.ndarray, rows: TrainingRows
) -> None:
    labels = np.repeat(np.arange(2), 20)
    picked = np.zeros(40, dtype=np.int64)
    seen = []
    for seed, epoch, index in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)):
        dataset = TriModalDataset(rows, manifest, pixels, pad=2, seed=seed)
        batch = PKBatch(epoch=epoch, index=index, labels=labels, visible=picked, infrared=picked)
        found = dataset[batch]
        assert_same(found, dataset[batch])
        seen += [str(found.draws[recipe].flip_B.tolist()) for recipe in RECIPES]
    assert len(set(seen)) == len(seen)


def test_cached_features_touch_no_pixel(manifest: pa.Table, captions: pa.Table, rows: TrainingRows) -> None:
    views = make_views(rows)
    dataset = TriModalDataset(
        rows,
        manifest,
        Untouchable(),
        pad=2,
        seed=0,
        captions=captions,
        views=views,  # type: ignore[arg-type]
    )
    chosen: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    sampler = rows.sampler(3, 2, seed=0)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        for batch in sampler:
            found = dataset[batch]
            assert found.pixels == {} and found.draws == {}
            for number, recipe in enumerate(RECIPES):
                source, view, row = found.features[recipe].unbind(dim=1)
                assert (source == number).all()
                assert row.tolist() == (batch.infrared if recipe == "infrared" else batch.visible).tolist()
                chosen[recipe] += view.tolist()
    for picks in chosen.values():
        share = np.bincount(np.array(picks, dtype=int), minlength=3) / len(picks)
        assert np.abs(share - 1 / 3).max() < 5 * (2 / 9 / len(picks)) ** 0.5
    assert chosen["visible"] != chosen["visible_augmented"]


def test_pixels_are_needed_without_views(manifest: pa.Table, rows: TrainingRows) -> None:
    dataset = TriModalDataset(rows, manifest, Untouchable(), pad=2, seed=0)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="was read"):
        dataset[next(iter(rows.sampler(3, 2, seed=0)))]


@pytest.mark.parametrize(("probability", "column"), [(0.0, "caption"), (1.0, "rephrased")])
def test_probability_zero_keeps_and_one_replaces_every_caption(
    manifest: pa.Table, captions: pa.Table, rows: TrainingRows, probability: float, column: str
) -> None:
    texts = dict(zip(captions["image"].to_pylist(), captions[column].to_pylist(), strict=True))
    dataset = TriModalDataset(
        rows,
        manifest,
        Untouchable(),  # type: ignore[arg-type]
        pad=2,
        seed=0,
        captions=captions,
        llm_probability=probability,
        views=make_views(rows),
    )
    for batch in rows.sampler(3, 4, seed=0):
        found = dataset[batch]
        visible = [texts[rows.visible["image"][int(row)].as_py()] for row in batch.visible]
        infrared = [texts[rows.infrared["image"][int(row)].as_py()] for row in batch.infrared]
        assert torch.equal(found.tokens, tokenize(visible))  # type: ignore[arg-type]  # cut to the longest too
        assert torch.equal(found.filter_tokens, tokenize(infrared))  # type: ignore[arg-type]


def test_rephrases_replace_both_captions_independently_with_their_probability(
    manifest: pa.Table, captions: pa.Table, rows: TrainingRows
) -> None:
    dataset = TriModalDataset(
        rows,
        manifest,
        Untouchable(),  # type: ignore[arg-type]
        pad=2,
        seed=0,
        captions=captions,
        llm_probability=0.3,
        views=make_views(rows),
    )
    first_token = int(tokenize(["rephrased"])[0, 1])
    sampler = rows.sampler(3, 8, seed=0)
    replaced = []
    for epoch in range(120):
        sampler.set_epoch(epoch)
        for batch in sampler:
            found = dataset[batch]
            replaced.append(torch.stack([found.tokens[:, 1], found.filter_tokens[:, 1]]) == first_token)  # type: ignore[index]
    both = torch.cat(replaced, dim=1).double()
    for hits in both:
        assert hits.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / both.shape[1]) ** 0.5)
    assert torch.corrcoef(both)[0, 1].abs() < 5 / both.shape[1] ** 0.5


def test_captions_are_cut_to_the_longest_of_the_batch() -> None:
    texts = ["red", "a man with a blue coat", "a " + "very " * 100 + "long sentence"]
    table = pa.Table.from_pylist(
        [{"image": str(i), "caption": text, "rephrased": text} for i, text in enumerate(texts)], schema=CAPTION_SCHEMA
    )
    captions = Captions(table, ["0", "1", "2"], with_rephrases=True)
    never = np.zeros(2, dtype=bool)
    for picked, length in (([0, 0], 3), ([0, 1], 8), ([1, 2], 77)):
        tokens = captions.batch(np.array(picked), never)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (2, length)
        assert torch.equal(tokens, tokenize([texts[i] for i in picked]))
        assert (tokens == 49407).sum(dim=1).tolist() == [1, 1]


def test_labels_are_contiguous_and_ascend_with_the_pid(manifest: pa.Table) -> None:
    for use_val, pids in ((False, [7, 23, 40]), (True, [7, 11, 23, 40])):
        rows = TrainingRows.from_manifest(manifest, use_val=use_val)
        assert rows.num_classes == len(pids)
        for table, labels in ((rows.visible, rows.visible_labels), (rows.infrared, rows.infrared_labels)):
            assert [pids[label] for label in labels] == table["pid"].to_pylist()
        assert set(rows.visible["modality"].to_pylist()) == {"visible"}
        assert set(rows.infrared["modality"].to_pylist()) == {"infrared"}
        assert rows.visible.num_rows == 2 * len(pids) and rows.infrared.num_rows == 3 * len(pids)


def test_tokens_are_cut_to_the_longest_sentence_and_clips_context_is_kept() -> None:
    texts = ["a red coat", "x " * 200]
    assert tokenize(texts).shape == (2, 77)
    assert tokenize(texts[:1]).shape == (1, 5)
    assert tokenize(texts[:1], pad_to_context=True).shape == (1, 77)
    assert tokenize(texts)[1, -1] == 49407
    with pytest.raises(ValueError, match="texts: expected at least one sentence, got none"):
        tokenize([])


def test_moving_a_batch_moves_every_part(
    manifest: pa.Table, captions: pa.Table, pixels: np.ndarray, rows: TrainingRows
) -> None:
    dataset = TriModalDataset(rows, manifest, pixels, pad=2, seed=0, captions=captions)
    batch = dataset[next(iter(rows.sampler(3, 2, seed=0)))]
    assert_same(batch, batch.to(torch.device("cpu")))
    moved = batch.to(torch.device("meta"))
    tensors = [moved.labels, moved.tokens, moved.filter_tokens, *moved.pixels.values()]
    tensors += [getattr(draws, field.name) for draws in moved.draws.values() for field in fields(Draws)]
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}
