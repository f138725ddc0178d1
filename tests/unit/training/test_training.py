"""A training stage on toy pixels: it learns, resumes to the bit, stops at nonsense, and keeps the best."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.oracles import lr_factors_loop
from tvilfm.config import (
    Config,
    LossSection,
    OptimSection,
    ScheduleSection,
    TextModelSection,
    TrainSection,
    load_config,
)
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest, column
from tvilfm.data.pixels import decode_files
from tvilfm.data.pk_sampler import PKBatch
from tvilfm.data.tri_modal import RECIPES, Batch, TrainingRows, TriModalDataset
from tvilfm.datasets.caption_files import read_published
from tvilfm.datasets.synthetic.people import ATTRIBUTES
from tvilfm.datasets.sysu_mm01 import read
from tvilfm.evaluation import evaluator as evaluator_module
from tvilfm.losses.objective import JointObjective
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.models.backbone import DualStemResNet
from tvilfm.models.tvilfm import parameter_digest
from tvilfm.models.weights import load_trained, trained_weights
from tvilfm.training import loop, stages
from tvilfm.training.checkpoint import NETWORK, Checkpoint
from tvilfm.training.loop import StageSettings, _evaluates, train_stage
from tvilfm.training.pretrain import attribute_labels, pretrain
from tvilfm.training.stages import StageData, train_base, train_text
from tvilfm.training.step import StageStep

CPU = torch.device("cpu")
HEIGHT, WIDTH = 32, 16
COLOURS = ("red", "green", "blue", "gray")


class Recorder:
    """A listener that keeps what it is told, and every checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, float | int]] = []
        self.epochs: list[dict[str, float | int]] = []
        self._writes: list[tuple[Path, Callable[[Path], None]]] = []

    def on_step(self, record: dict[str, float | int]) -> None:
        self.steps.append(record)

    def on_epoch(self, record: dict[str, float | int], write: Callable[[Path], None] | None) -> None:
        self.epochs.append(record)
        assert write is not None
        self._writes.append((self.checkpoint(int(record["epoch"])), write))

    def written(self) -> Recorder:
        """Write the checkpoints, long after their epochs: later training must not change them."""
        for folder, write in self._writes:
            folder.mkdir(parents=True)
            write(folder)
        return self

    def checkpoint(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}"


class Toy:
    """Four identities of plain colours, two images a modality; captions name the colour."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        palette = rng.integers(0, 256, (2, 4, 3))
        rows, pictures, captions = [], [], []
        for pid in range(4):
            for number in range(4):
                infrared = number >= 2
                camid = 3 if infrared else 1
                image = f"cam{camid}/{pid}/{number}.jpg"
                modality = "infrared" if infrared else "visible"
                rows.append({"image": image, "pid": pid, "camid": camid, "modality": modality, "split": "train"})
                noise = rng.normal(0, 10, (HEIGHT, WIDTH, 3))
                pictures.append(np.clip(palette[int(infrared), pid] + noise, 0, 255).astype(np.uint8))
                text = f"a person with a coat {number}" if infrared else f"a person with a {COLOURS[pid]} coat"
                captions.append({"image": image, "caption": text, "rephrased": f"{text} again"})
        self.manifest = build_manifest(rows)
        self.pixels = np.stack(pictures)
        self.captions = pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA)
        self.rows = TrainingRows.from_manifest(self.manifest, use_val=False)

    def dataset(self, *, text: bool, seed: int = 0) -> TriModalDataset:
        return TriModalDataset(
            self.rows,
            self.manifest,
            self.pixels,
            pad=2,
            seed=seed,
            captions=self.captions if text else None,
            llm_probability=0.5,
        )

    def model(self, *, text: bool) -> TVILFM:
        torch.manual_seed(0)
        spec = ModelSpec(
            backbone="resnet18_half", num_classes=4, text_width=16, text_layers=1, text_heads=2, with_text=False
        )
        model = TVILFM(spec)
        if text:
            model.start_text_stage(TextModelSection(width=16, layers=1, heads=2))
        return model

    def run(
        self,
        folder: Path,
        *,
        text: bool = False,
        epochs: int = 3,
        settings: dict[str, Any] | None = None,
        dataset: TriModalDataset | None = None,
        validate: Callable[[TVILFM], dict[str, float]] | None = None,
        eval_every: int = 1,
        resume: Path | None = None,
        model: TVILFM | None = None,
    ) -> tuple[TVILFM, Recorder]:
        recorder = Recorder(folder)
        stage = StageSettings(
            train=TrainSection(p=2, k=2, autocast="off"),
            schedule=ScheduleSection(
                epochs=epochs, warmup_epochs=1, milestones=(4,), select="last", eval_every=eval_every
            ),
            loss=LossSection(),
            optim=OptimSection(lr=2e-3, text_lr=2e-3),
            pad=2,
            freeze_visual=text,
            freeze_batch_norm=True,
        )
        trained = train_stage(
            self.model(text=text) if model is None else model,
            self.rows.sampler(2, 2, seed=0),
            self.dataset(text=text) if dataset is None else dataset,
            replace(stage, **(settings or {})),
            device=CPU,
            validate=validate,
            listener=recorder,
            resume=resume,
        )
        return trained, recorder.written()


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.mark.parametrize("text", [False, True])
def test_the_loss_falls_on_a_toy(toy: Toy, tmp_path: Path, text: bool) -> None:
    model, recorder = toy.run(tmp_path, text=text, epochs=8)
    losses = [float(record["loss"]) for record in recorder.epochs]
    assert np.mean(losses[-2:]) < 0.8 * losses[0], losses
    assert not model.training


def test_records_are_means_of_the_steps_terms(toy: Toy, tmp_path: Path) -> None:
    _, recorder = toy.run(tmp_path, epochs=2)
    per_epoch = len(toy.rows.sampler(2, 2, seed=0))
    assert [record["epoch"] for record in recorder.epochs] == [0, 1]
    for record in recorder.epochs:
        steps = [step for step in recorder.steps if step["epoch"] == record["epoch"]]
        assert [step["step"] for step in steps] == list(range(1, per_epoch + 1))
        assert {step["num_steps"] for step in steps} == {per_epoch}
        for term in ("id", "wrt"):
            assert record[term] == pytest.approx(np.mean([step[term] for step in steps]))
        assert record["loss"] == pytest.approx(record["id"] + record["wrt"])


@pytest.mark.parametrize("text", [False, True])
def test_a_resumed_stage_ends_with_the_weights_of_the_undisturbed_one(toy: Toy, tmp_path: Path, text: bool) -> None:
    whole, recorder = toy.run(tmp_path / "whole", text=text, epochs=4)
    resumed, rest = toy.run(
        tmp_path / "rest",
        text=text,
        epochs=4,
        resume=recorder.checkpoint(1),
        model=_without_trained(toy.model(text=text), text=text),
    )
    assert [record["epoch"] for record in rest.epochs] == [2, 3]
    assert parameter_digest(resumed) == parameter_digest(whole)
    assert parameter_digest(TVILFM.from_pretrained(rest.checkpoint(3) / NETWORK)) == parameter_digest(whole)
    for first, second in zip(recorder.epochs[2:], rest.epochs, strict=True):
        assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


def _without_trained(model: TVILFM, *, text: bool) -> TVILFM:
    """Return the network with zeros in all weights that the stage trains."""
    if text:
        model.freeze_visual()
    load_trained(model, {name: torch.zeros_like(value) for name, value in trained_weights(model).items()})
    return model


@pytest.mark.parametrize("text", [False, True])
def test_a_checkpoint_holds_what_is_trained_once(toy: Toy, tmp_path: Path, text: bool) -> None:
    """Bytes written per epoch, compared with the network, its best copy, both again and the optimizer, as before."""
    validate, _ = scripted([0.7, 0.2, 0.1])
    _, recorder = toy.run(tmp_path, text=text, epochs=3, validate=validate)
    model = toy.model(text=text)
    whole = sum(value.nbytes for value in model.state_dict().values())
    if text:
        model.freeze_visual()
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    buffers = sum(buffer.nbytes for buffer in model.buffers())

    def written(epoch: int) -> int:
        return sum(path.stat().st_size for path in recorder.checkpoint(epoch).rglob("*") if path.is_file())

    # Adam has two moments. The current network of the first epoch is the best one.
    assert written(0) == pytest.approx(3 * trained + buffers, rel=0.02)
    assert written(1) == pytest.approx(4 * trained + 2 * buffers, rel=0.02)
    assert written(2) == pytest.approx(4 * trained + 2 * buffers + whole, rel=0.02)  # with the result
    before = 2 * whole + 2 * trained
    assert written(1) < 0.75 * before if text else written(0) < 0.8 * before


def test_the_checkpoint_of_another_network_is_refused(toy: Toy, tmp_path: Path) -> None:
    _, recorder = toy.run(tmp_path / "base", epochs=1)
    with pytest.raises(ValueError, match="checkpoint: expected the trained weights of this network, got others"):
        toy.run(tmp_path / "text", text=True, epochs=2, resume=recorder.checkpoint(0))


def test_the_checkpoint_of_the_last_epoch_needs_no_more_training(toy: Toy, tmp_path: Path) -> None:
    whole, recorder = toy.run(tmp_path / "whole", epochs=2)
    again, rest = toy.run(tmp_path / "rest", epochs=2, resume=recorder.checkpoint(1))
    assert rest.epochs == []
    assert parameter_digest(again) == parameter_digest(whole)


def test_the_rate_follows_the_schedule(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []
    real = loop.StageOptimizer.set_lr_factor
    monkeypatch.setattr(
        loop.StageOptimizer, "set_lr_factor", lambda self, factor: (factors.append(factor), real(self, factor))[1]
    )
    schedule = ScheduleSection(epochs=6, warmup_epochs=3, milestones=(4, 5), select="last")
    toy.run(tmp_path, settings={"schedule": schedule})
    assert factors == pytest.approx(lr_factors_loop(6, 3, (4, 5)))


class BrokenFeatures(TriModalDataset):
    """Cached features, of which one is spoilt in one batch of one epoch."""

    value = torch.nan

    def __getitem__(self, batch: PKBatch) -> Batch:
        found = super().__getitem__(batch)
        if (batch.epoch, batch.index) == (1, 2):
            found.features["visible"][0, 0] = self.value
        return found


def test_published_skips_the_step_of_a_loss_that_is_not_finite_where_a_scaler_is_used(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=8.0))  # as on CUDA
    model = toy.model(text=True)
    rng = np.random.default_rng(0)
    views: dict[Any, Any] = {r: rng.random((1, 8, model.spec.dim)).astype(np.float32) for r in RECIPES}
    dataset = BrokenFeatures(toy.rows, toy.manifest, toy.pixels, pad=2, seed=0, captions=toy.captions, views=views)
    dataset.value = 1e4  # a distance past 88: the released soft margin is infinite
    loss = LossSection(id_weight=0.0, wrt_numerics="published")
    trained, recorder = toy.run(tmp_path, text=True, model=model, dataset=dataset, settings={"loss": loss})
    spoilt = [step for step in recorder.steps if not np.isfinite(step["wrt"])]
    assert [(step["epoch"], step["step"]) for step in spoilt] == [(1, 3)]
    assert all(np.isfinite(record["wrt"]) for record in recorder.epochs)
    assert all(value.isfinite().all() for value in trained.state_dict().values())


@pytest.mark.parametrize("text", [False, True])
def test_a_scaled_loss_trains_the_weights_of_an_unscaled_one(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bool
) -> None:
    plain, _ = toy.run(tmp_path / "plain", text=text, epochs=2)
    scaler = torch.amp.GradScaler
    scales: list[float] = []

    class Watched(scaler):  # type: ignore[misc, valid-type]
        def update(self, new_scale: float | None = None) -> None:
            scales.append(self.get_scale())
            super().update(new_scale)

    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: Watched(device, init_scale=2.0**16))
    scaled, recorder = toy.run(tmp_path / "scaled", text=text, epochs=2)
    # A power of two scales without rounding. Adam alone would hide a forgotten factor, its weight decay does not.
    assert parameter_digest(scaled) == parameter_digest(plain)
    assert scales == [2.0**16] * len(recorder.steps)  # updated once a step
    _, rest = toy.run(tmp_path / "rest", text=text, epochs=2, resume=recorder.checkpoint(0))
    for each in (recorder, rest):  # a resumed stage counts the steps since the scale last changed from where it was
        state = Checkpoint.read(each.checkpoint(1)).scaler
        assert state["scale"] == 2.0**16 and state["_growth_tracker"] == len(recorder.steps)


@pytest.mark.parametrize(("dropped", "term"), [("wrt_weight", "id"), ("id_weight", "wrt")])
def test_a_loss_that_is_not_finite_names_term_epoch_and_batch(
    toy: Toy, tmp_path: Path, dropped: str, term: str
) -> None:
    model = toy.model(text=True)
    rng = np.random.default_rng(0)
    views: dict[Any, Any] = {r: rng.random((1, 8, model.spec.dim)).astype(np.float32) for r in RECIPES}
    dataset = BrokenFeatures(toy.rows, toy.manifest, toy.pixels, pad=2, seed=0, captions=toy.captions, views=views)
    settings = {"loss": LossSection.model_validate({dropped: 0.0})}
    with pytest.raises(
        FloatingPointError, match=rf"loss\.{term}: expected a finite number, got nan in epoch 1, batch 2"
    ):
        toy.run(tmp_path, text=True, dataset=dataset, settings=settings, model=model)


def scripted(scores: list[float]) -> tuple[Callable[[TVILFM], dict[str, float]], list[str]]:
    digests: list[str] = []

    def validate(model: TVILFM) -> dict[str, float]:
        assert not model.training
        digests.append(parameter_digest(model))
        return {"score": scores[len(digests) - 1], "val_mAP": scores[len(digests) - 1]}

    return validate, digests


def test_the_best_validation_is_kept_and_the_first_of_equals(toy: Toy, tmp_path: Path) -> None:
    validate, digests = scripted([0.2, 0.7, 0.7, 0.1])
    trained, recorder = toy.run(tmp_path, epochs=4, validate=validate)
    assert len(set(digests)) == 4
    for epoch, best in enumerate([0, 1, 1, 1]):
        folder = recorder.checkpoint(epoch)
        checkpoint = Checkpoint.read(folder)
        assert _digest(toy, checkpoint.best) == digests[best]
        assert _digest(toy, checkpoint.current) == digests[epoch]
        progress = checkpoint.progress
        assert (progress.epochs_done, progress.best_epoch) == (epoch + 1, best)
        assert progress.best_score == [0.2, 0.7][min(epoch, 1)]
    assert parameter_digest(trained) == digests[3]
    assert [record["val_mAP"] for record in recorder.epochs] == [0.2, 0.7, 0.7, 0.1]


def _digest(toy: Toy, weights: dict[str, torch.Tensor]) -> str:
    model = toy.model(text=False)
    load_trained(model, weights)
    return parameter_digest(model)


def test_validation_comes_every_so_many_epochs_and_at_the_end(toy: Toy, tmp_path: Path) -> None:
    validate, digests = scripted([0.5, 0.3, 0.4])
    _, recorder = toy.run(tmp_path, epochs=5, eval_every=2, validate=validate)
    assert ["score" in record for record in recorder.epochs] == [False, True, False, True, True]
    assert parameter_digest(TVILFM.from_pretrained(recorder.checkpoint(4) / NETWORK)) == digests[0]
    # Before the first validation the current weights stand in.
    first = Checkpoint.read(recorder.checkpoint(0))
    assert first.progress.best_epoch == -1 and first.best is first.current


def test_without_validation_the_last_epoch_is_kept(toy: Toy, tmp_path: Path) -> None:
    trained, recorder = toy.run(tmp_path, epochs=2)
    for epoch in (0, 1):
        assert Checkpoint.read(recorder.checkpoint(epoch)).progress.best_epoch == epoch
    best = TVILFM.from_pretrained(recorder.checkpoint(1) / NETWORK)
    assert parameter_digest(best) == parameter_digest(trained)


def test_the_best_model_survives_a_resume(toy: Toy, tmp_path: Path) -> None:
    validate, digests = scripted([0.9, 0.2])
    _, recorder = toy.run(tmp_path / "first", epochs=2, validate=validate)
    later, _ = scripted([0.3, 0.4])
    _, rest = toy.run(tmp_path / "rest", epochs=4, validate=later, resume=recorder.checkpoint(1))
    assert parameter_digest(TVILFM.from_pretrained(rest.checkpoint(3) / NETWORK)) == digests[0]
    progress = Checkpoint.read(rest.checkpoint(3)).progress
    assert (progress.best_epoch, progress.best_score) == (0, 0.9)


@pytest.mark.parametrize(("joint", "filter_text"), [(True, True), (True, False), (False, True), (False, False)])
@torch.no_grad()
def test_a_step_is_the_objective_of_rows_encoded_one_modality_at_a_time(
    toy: Toy, joint: bool, filter_text: bool
) -> None:
    from tvilfm.data.transforms import augment

    model = toy.model(text=True).eval()  # eval: batch statistics would tie the modalities together
    objective = JointObjective(LossSection(joint=joint, filter_text=filter_text, center_weight=0.1))
    batch = toy.dataset(text=True)[next(iter(toy.rows.sampler(2, 2, seed=0)))]
    found = StageStep(model, objective, pad=2)(batch)
    images = {recipe: augment(batch.pixels[recipe], batch.draws[recipe], pad=2) for recipe in RECIPES}
    visible, augmented = model.encode_visible(images["visible"]), model.encode_visible(images["visible_augmented"])
    infrared = model.encode_infrared(images["infrared"])
    assert batch.tokens is not None and batch.filter_tokens is not None
    text, own = model.encode_text(batch.tokens), model.encode_text(batch.filter_tokens)
    fusion = infrared + text - own if filter_text else infrared + text
    rows = torch.cat([visible, augmented, infrared, fusion, text] if joint else [visible, augmented, fusion])
    labels = torch.cat([batch.labels] * (5 if joint else 3))
    groups = torch.arange(5 if joint else 3).repeat_interleave(len(batch.labels))
    expected = objective(rows, model.head(rows), labels, groups)
    for name in ("id", "wrt", "center"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def tiny_config(root: Path, *overrides: str) -> Config:
    small = [
        f"data.root={root}",
        "data.height=32",
        "data.width=16",
        "data.pad=2",
        "model.backbone=resnet18_half",
        "model.weights=random",
        "model.text={width: 16, layers: 1, heads: 2, weights: random}",
        "train.p=2",
        "train.k=2",
        "optim={lr: 0.002, text_lr: 0.002}",
        "train.base={epochs: 2, warmup_epochs: 1, milestones: [2], eval_every: 1}",
        "train.text={epochs: 2, warmup_epochs: 1, milestones: [2], eval_every: 1}",
    ]
    return load_config(None, [*small, *overrides])


@pytest.fixture(scope="module")
def stage_data(tiny_benchmark: Path) -> StageData:
    manifest = read(tiny_benchmark)
    return StageData(
        manifest=manifest,
        pixels=decode_files(tiny_benchmark, manifest["image"].to_pylist(), height=HEIGHT, width=WIDTH),
        captions=read_published(tiny_benchmark, manifest),
    )


def test_the_published_schedule_validates_every_second_epoch_from_the_eightieth_on() -> None:
    schedule = load_config(overrides=["fidelity=published"]).train.base
    assert [epoch + 1 for epoch in range(90) if _evaluates(schedule, epoch)] == [80, 82, 84, 86, 88, 90]
    corrected = load_config().train.base
    assert [epoch + 1 for epoch in range(12) if _evaluates(corrected, epoch)] == [5, 10]


@pytest.mark.parametrize(("select_by", "kept"), [("rank1", 2), ("mAP", 1)])
def test_of_equal_scores_rank1_keeps_the_later_epoch_and_map_the_earlier(
    tiny_benchmark: Path,
    stage_data: StageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    select_by: str,
    kept: int,
) -> None:
    scores = iter([0.2, 0.5, 0.5, 0.1])
    monkeypatch.setattr(stages, "_validator", lambda *args, **options: lambda model: {"score": next(scores)})
    overrides = ["train.base.epochs=4", "train.base.eval_every=1", f"train.base.select_by={select_by}"]
    recorder = Recorder(tmp_path)
    train_base(tiny_config(tiny_benchmark, *overrides), stage_data, backbone=None, device=CPU, listener=recorder)
    progress = Checkpoint.read(recorder.written().checkpoint(3)).progress
    assert progress.best_epoch == kept


@pytest.mark.parametrize(
    ("overrides", "split", "num_classes"),
    [
        ([], "val", 6),
        (
            [
                "fidelity=published",
                "train.base={eval_from: 1, eval_every: 1}",
                "train.text={eval_from: 1, eval_every: 1}",
            ],
            "test",
            8,
        ),
        (["train.text.freeze_gem=false", "loss.filter_text=false"], "val", 6),
        (["train.base.select=last", "train.text.select=last"], None, 6),
        (
            ["train.base={select: last, use_val: true}", "train.text={select: last, use_val: true}"],
            None,
            8,
        ),
    ],
)
def test_both_stages_run_and_choose_by_the_split_the_config_names(
    tiny_benchmark: Path,
    stage_data: StageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    split: str | None,
    num_classes: int,
) -> None:
    splits: list[str] = []

    class Watched(evaluator_module.Evaluator):
        def __init__(self, *args: Any, **options: Any) -> None:
            splits.append(options["split"])
            super().__init__(*args, **options)

    monkeypatch.setattr(stages, "Evaluator", Watched)
    config = tiny_config(tiny_benchmark, *overrides)
    recorder = Recorder(tmp_path / "base")
    base = train_base(config, stage_data, backbone=None, device=CPU, listener=recorder)
    assert base.spec.num_classes == num_classes and base.text is None
    visual = {key: value.clone() for key, value in base.state_dict().items() if key.startswith(("backbone.", "pool."))}
    head = base.head.classifier.weight.detach().clone()
    text_recorder = Recorder(tmp_path / "text")
    model = train_text(config, stage_data, base=base, views=None, device=CPU, listener=text_recorder)
    state = model.state_dict()
    same = [key for key, value in visual.items() if torch.equal(value, state[key])]
    buffers = [key for key in visual if "running" in key or "num_batches" in key]
    moved = (buffers if config.fidelity == "published" else []) + ["pool.p"] * config.trains_gem
    assert set(same) == set(visual) - set(moved) and model.spec.trained_pool == config.trains_gem
    assert model.base_head is not None and torch.equal(model.base_head.classifier.weight, head)
    assert not torch.equal(model.head.classifier.weight, head)
    assert set(splits) == ({split} if split else set())
    for record in recorder.epochs + text_recorder.epochs:
        assert ("score" in record) == bool(split)
        if split:
            selected = "val_rank1" if config.fidelity == "published" else "val_mAP"
            assert 0 <= record["val_rank1"] <= 1 and record["score"] == record[selected]


def test_cached_views_of_the_frozen_network_train_without_pixels(
    tiny_benchmark: Path, stage_data: StageData, tmp_path: Path
) -> None:
    config = tiny_config(tiny_benchmark, "train.base.select=last", "train.text.select=last")
    rows = TrainingRows.from_manifest(stage_data.manifest, use_val=False)
    torch.manual_seed(0)
    base = TVILFM(stages.spec_from_config(config.model, rows.num_classes, with_text=False))
    rng = np.random.default_rng(0)
    counts = {recipe: len(rows.infrared_labels if recipe == "infrared" else rows.visible_labels) for recipe in RECIPES}
    views: dict[Any, Any] = {
        recipe: rng.random((2, count, base.spec.dim)).astype(np.float32) for recipe, count in counts.items()
    }
    unread = replace(stage_data, pixels=None)  # type: ignore[arg-type]
    recorder = Recorder(tmp_path)
    train_text(config, unread, base=base, views=views, device=CPU, listener=recorder)
    assert len(recorder.epochs) == 2


def test_a_pre_trained_backbone_is_what_the_base_stage_starts_from(
    tiny_benchmark: Path, stage_data: StageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def untrained(model: TVILFM, *args: Any, **options: Any) -> TVILFM:
        started.append(parameter_digest(model.backbone))
        return model

    monkeypatch.setattr(stages, "train_stage", untrained)
    torch.manual_seed(9)
    backbone = DualStemResNet("resnet18_half")
    config = tiny_config(tiny_benchmark)
    for state in (backbone.state_dict(), None, None):
        train_base(config, stage_data, backbone=state, device=CPU, listener=Recorder(tmp_path))
    train_base(
        tiny_config(tiny_benchmark, "run.seed=1"), stage_data, backbone=None, device=CPU, listener=Recorder(tmp_path)
    )
    assert started[0] == parameter_digest(backbone)
    assert started[1] == started[2] and len(set(started)) == 3  # a random start follows from the seed


def test_pre_training_learns_the_attributes_that_each_modality_shows(
    tiny_benchmark: Path, stage_data: StageData
) -> None:
    labels = attribute_labels(tiny_benchmark, stage_data.manifest)
    truth = json.loads((tiny_benchmark / "attributes.json").read_text())
    assert labels.shape == (stage_data.manifest.num_rows, len(ATTRIBUTES))
    for pid, row in zip(column(stage_data.manifest, "pid"), labels, strict=True):
        for (name, values), index in zip(ATTRIBUTES.items(), row, strict=True):
            assert values[index] == truth[str(pid)][name]
    section = load_config().train.pretrain.model_copy(update={"steps": 30, "batch": 16})
    losses: list[float] = []
    digests = []
    for _ in range(2):
        torch.manual_seed(0)
        backbone = DualStemResNet("resnet18_half")
        pretrain(
            backbone,
            stage_data.manifest,
            stage_data.pixels,
            labels,
            section,
            pad=2,
            seed=0,
            device=CPU,
            on_step=lambda record: losses.append(float(record["loss"])),
        )
        digests.append(parameter_digest(backbone))
    assert digests[0] == digests[1] and not backbone.training
    assert len(losses) == 60
    assert np.mean(losses[20:30]) < 0.95 * np.mean(losses[:5])
