"""The network's parts against torchvision, open_clip and plain loops; what is frozen stays frozen to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.oracles import gem_loop, stretch_loop
from tvilfm.config import LossSection, ModelSection, OptimSection, TextModelSection
from tvilfm.data.tokens import tokenize
from tvilfm.data.transforms import augment, draw
from tvilfm.data.tri_modal import RECIPES, Batch
from tvilfm.losses.objective import JointObjective
from tvilfm.models import TVILFM, ModelSpec, spec_from_config
from tvilfm.models.backbone import DualStemResNet, load_imagenet, read_state_dict
from tvilfm.models.bn_neck import BNNeck
from tvilfm.models.fusion import semantic_filtered_fusion
from tvilfm.models.gem import GeMPool
from tvilfm.models.text_encoder import TextEncoder, load_clip_text, stretch_projection
from tvilfm.models.tvilfm import load_text_weights, load_visual_weights, parameter_digest
from tvilfm.training.optim import StageOptimizer
from tvilfm.training.step import StageStep

SPEC = ModelSpec(backbone="resnet18_half", num_classes=3, text_width=16, text_layers=2, text_heads=2)
TEXTS = ["a man", "a woman with long hair wearing a red coat and a bag on the back", "blue"]


def shake_batch_norm(module: nn.Module) -> None:
    """Statistics and weights that differ from the identity, so that a missing layer shows."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor, low, high in (
                (child.running_mean, -0.5, 0.5),
                (child.running_var, 0.5, 2.0),
                (child.weight.data, 0.5, 1.5),
                (child.bias.data, -0.5, 0.5),
            ):
                assert tensor is not None
                tensor.uniform_(low, high)


def make_model(spec: ModelSpec = SPEC) -> TVILFM:
    torch.manual_seed(0)
    model = TVILFM(spec)
    shake_batch_norm(model)
    return model.eval()


def make_images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def resnet50() -> torchvision.models.ResNet:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    shake_batch_norm(model)
    return model


@pytest.fixture(scope="module")
def resnet50_file(resnet50: torchvision.models.ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(resnet50.state_dict(), path)
    return path


@torch.no_grad()
def test_resnet50_filled_from_torchvision_gives_torchvisions_layer_outputs(
    resnet50: torchvision.models.ResNet, resnet50_file: Path
) -> None:
    ours = DualStemResNet("resnet50")
    load_imagenet(ours, "resnet50", str(resnet50_file))
    ours.eval()
    strides = [(module, module.stride) for module in (resnet50.layer4[0].conv2, resnet50.layer4[0].downsample[0])]
    assert [stride for _, stride in strides] == [(2, 2), (2, 2)]
    images = torch.randn(2, 3, 64, 32)
    x = y = images
    try:
        for module, _ in strides:
            module.stride = (1, 1)  # the last stride
        x = resnet50.maxpool(resnet50.bn1(resnet50.conv1(x)))  # no ReLU
        assert (x < 0).any()
        for stem in (ours.visible_stem, ours.infrared_stem):
            torch.testing.assert_close(stem(images), x, rtol=0, atol=1e-6)
        y = ours.visible_stem(images)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x, y = resnet50.get_submodule(name)(x), ours.get_submodule(name)(y)
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
    finally:
        for module, stride in strides:
            module.stride = stride
    torch.testing.assert_close(ours(images, None), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(None, images), x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_paper_sized_image_becomes_2048_x_18_x_9() -> None:
    backbone = DualStemResNet("resnet50").eval()
    assert backbone.dim == 2048
    assert backbone(torch.zeros(1, 3, 288, 144), None).shape == (1, 2048, 18, 9)
    small = DualStemResNet("resnet18_half").eval()
    assert small(None, torch.zeros(2, 3, 96, 48)).shape == (2, small.dim, 6, 3)


def test_weights_that_do_not_fit_are_refused_by_key(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pth"
    torch.save({"stem.weight": torch.zeros(1)}, foreign)
    with pytest.raises(
        ValueError, match=r"model\.weights: expected a resnet18_half state dict in torchvision's layout"
    ):
        load_imagenet(DualStemResNet("resnet18_half"), "resnet18_half", str(foreign))
    state = DualStemResNet("resnet18_half").state_dict()
    fitting = {k.removeprefix("visible_stem."): v for k, v in state.items() if not k.startswith("infrared_stem.")}
    torch.save(fitting | {"layer1.7.conv1.weight": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match=r"missing \[\] and unknown \['layer1\.7"):
        load_imagenet(DualStemResNet("resnet18_half"), "resnet18_half", str(foreign))
    with pytest.raises(ValueError, match=r"model\.weights: .* for resnet18_half, got imagenet"):
        load_imagenet(DualStemResNet("resnet18_half"), "resnet18_half")
    with pytest.raises(ValueError, match=r"model\.weights: expected a state-dict file, got .*nowhere"):
        load_imagenet(DualStemResNet("resnet50"), "resnet50", str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod."])
def test_weights_of_a_wrapped_network_are_read_and_said(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"a.weight": torch.arange(3.0), "b": torch.ones(1)}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {f"{prefix}{key}": value for key, value in state.items()}}, path)
    found = read_state_dict(str(path), "model.weights")
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    assert f"the prefix '{prefix}' was removed" in caplog.text and "read from 'state_dict'" in caplog.text


def test_state_dicts_are_read_from_both_formats_and_nothing_else(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "s.pth")
    save_file(state, tmp_path / "s.safetensors")
    for name in ("s.pth", "s.safetensors"):
        assert torch.equal(read_state_dict(str(tmp_path / name), "key")["a"], state["a"])
    for number, content in enumerate(([torch.zeros(1)], {"network": state}, {"epoch": 3})):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(ValueError, match="key: expected a plain state dict"):
            read_state_dict(str(tmp_path / f"{number}.pth"), "key")


@pytest.mark.parametrize("name", ["garbage.pth", "garbage.safetensors"])
def test_a_file_that_is_no_state_dict_is_refused_by_key(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is no state dict")
    with pytest.raises(ValueError, match=r"^key: "):
        read_state_dict(str(tmp_path / name), "key")


def test_gem_is_the_generalised_mean() -> None:
    maps = torch.from_numpy(np.random.default_rng(0).uniform(-1, 3, (2, 5, 4, 3)))
    for p in (1.0, 3.0, 6.5):
        pool = GeMPool(p)
        expected = gem_loop(maps.numpy(), p, 1e-6)
        np.testing.assert_allclose(pool(maps).detach().numpy(), expected, rtol=1e-5)
    pool = GeMPool()
    assert pool.p.item() == 3.0 and pool.p.requires_grad
    pool(maps).sum().backward()
    assert pool.p.grad is not None and pool.p.grad.abs() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pool(maps.bfloat16()).dtype == torch.float32


def test_the_neck_normalises_then_classifies_without_bias() -> None:
    torch.manual_seed(0)
    neck = BNNeck(6, 4)
    assert neck.bn.weight.requires_grad and neck.bn.bias.requires_grad
    assert neck.classifier.bias is None
    assert BNNeck(200, 500).classifier.weight.std().item() == pytest.approx(1e-3, rel=0.02)
    raw = torch.randn(8, 6) * 3 + 1
    shake_batch_norm(neck)
    neck.train()
    x = raw.double()
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    shaken = (x - mean) / (variance + 1e-5).sqrt() * neck.bn.weight.double() + neck.bn.bias.double()
    torch.testing.assert_close(neck(raw).double(), shaken @ neck.classifier.weight.double().T, rtol=1e-4, atol=1e-6)
    neck.eval()
    assert neck.bn.running_mean is not None and neck.bn.running_var is not None
    x = (x - neck.bn.running_mean) / (neck.bn.running_var.double() + 1e-5).sqrt() * neck.bn.weight + neck.bn.bias
    unit = torch.stack([row / (row @ row).sqrt() for row in x])
    torch.testing.assert_close(neck.embed(raw).double(), unit, rtol=1e-4, atol=1e-6)


def test_fusion_adds_the_text_and_subtracts_the_filter_with_gradients_through_all() -> None:
    parts = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    torch.testing.assert_close(semantic_filtered_fusion(*parts), parts[0] + parts[1] - parts[2])
    torch.testing.assert_close(semantic_filtered_fusion(parts[0], parts[1], None), parts[0] + parts[1])
    semantic_filtered_fusion(*parts).sum().backward()
    assert [part.grad.mean().item() for part in parts if part.grad is not None] == [1, 1, -1]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    encoder = TextEncoder(dim=24, width=16, layers=2, heads=2)
    # open_clip's initial embeddings are so small that a lost position would hide in the tolerance.
    nn.init.normal_(encoder.tower.token_embedding.weight)
    nn.init.normal_(encoder.tower.positional_embedding)
    return encoder.eval()


@torch.no_grad()
def test_real_length_equals_padded_to_clips_context(encoder: TextEncoder) -> None:
    short, padded = tokenize(TEXTS), tokenize(TEXTS, pad_to_context=True)
    assert short.shape[1] < padded.shape[1] == 77
    features = encoder(short)
    assert features.dtype == torch.float32 and features.shape == (3, 24)
    assert features.abs().mean() > 0.1
    torch.testing.assert_close(features, encoder(padded), rtol=1e-5, atol=1e-5)
    alone = torch.cat([encoder(tokenize([text])) for text in TEXTS])
    torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_encoder_equals_open_clips_own_tower(encoder: TextEncoder) -> None:
    from open_clip.model import CLIPTextCfg, _build_text_tower

    reference = _build_text_tower(24, CLIPTextCfg(width=16, heads=2, layers=2), quick_gelu=True)
    reference.load_state_dict(encoder.tower.state_dict(), strict=True)
    tokens = tokenize(TEXTS, pad_to_context=True)
    torch.testing.assert_close(encoder(tokenize(TEXTS)), reference.eval()(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_word_order_and_every_word_matter(encoder: TextEncoder) -> None:
    first, swapped, other = encoder(tokenize(["red coat blue bag", "blue coat red bag", "red coat blue hat"]))
    assert (first - swapped).abs().max() > 1e-2 and (first - other).abs().max() > 1e-2


@pytest.mark.parametrize(("columns", "dim"), [(4, 8), (5, 10), (6, 4), (3, 7), (4, 4), (1, 3)])
def test_the_projection_is_stretched_linearly_and_rounded_through_half(columns: int, dim: int) -> None:
    projection = torch.randn(3, columns, dtype=torch.float64)
    expected = np.array(stretch_loop(projection.tolist(), dim))
    found = stretch_projection(projection, dim)
    assert found.dtype == torch.float32 and found.shape == (3, dim)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2**-11, atol=1e-6)  # half a unit of half's last place
    assert torch.equal(found, found.half().float())


def clip_state(encoder: TextEncoder, columns: int) -> dict[str, Tensor]:
    """A state dict as CLIP's: half precision, an image tower, a narrower projection."""
    state = {key: value.half() for key, value in encoder.tower.state_dict().items()}
    state["text_projection"] = torch.randn(16, columns).half()
    return state | {"visual.transformer.resblocks.0.ln_1.weight": torch.zeros(2), "logit_scale": torch.zeros(())}


def test_clips_text_half_is_loaded_and_its_projection_stretched(encoder: TextEncoder, tmp_path: Path) -> None:
    state = clip_state(encoder, 12)
    torch.save(state, tmp_path / "clip.pt")
    loaded = TextEncoder(dim=24, width=16, layers=2, heads=2)
    load_clip_text(loaded, 24, str(tmp_path / "clip.pt"))
    for key, value in loaded.tower.state_dict().items():
        if key != "text_projection":
            assert torch.equal(value, state[key].float()), key
    expected = np.array(stretch_loop(state["text_projection"].double().tolist(), 24))
    np.testing.assert_allclose(loaded.tower.text_projection.detach().numpy(), expected, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("fault", ["missing", "narrow", "images only"])
def test_a_state_dict_of_another_tower_is_refused(encoder: TextEncoder, tmp_path: Path, fault: str) -> None:
    state = clip_state(encoder, 12)
    if fault == "missing":
        del state["ln_final.weight"]
    elif fault == "narrow":
        state["positional_embedding"] = torch.zeros(77, 8)
    else:
        state = {"visual.conv1.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"model\.text\.weights: expected CLIP RN50's text tower, got .*clip\.pt"):
        load_clip_text(TextEncoder(dim=24, width=16, layers=2, heads=2), 24, str(tmp_path / "clip.pt"))
    with pytest.raises(ValueError, match=r"model\.text\.weights: expected a state-dict file, got .*nowhere"):
        load_clip_text(encoder, 24, str(tmp_path / "nowhere.pt"))


def test_the_config_names_the_network_and_its_weights(tmp_path: Path) -> None:
    section = ModelSection.model_validate(
        {
            "backbone": "resnet18_half",
            "weights": str(tmp_path / "visual.pth"),
            "text": {"width": 16, "layers": 2, "heads": 2, "weights": str(tmp_path / "text.pt")},
        }
    )
    assert spec_from_config(section, 3, with_text=True) == SPEC
    model, source = make_model(), make_model()
    state = {f"fc.{name}": torch.zeros(1) for name in ("weight", "bias")}
    for key, value in source.backbone.state_dict().items():
        if not key.startswith("infrared_stem."):
            state[key.removeprefix("visible_stem.")] = value + 1
    torch.save(state, tmp_path / "visual.pth")
    torch.save(clip_state(TextEncoder(dim=8, width=16, layers=2, heads=2), 5), tmp_path / "text.pt")
    load_visual_weights(model, section)
    load_text_weights(model, section)
    assert torch.equal(model.backbone.infrared_stem.conv1.weight, source.backbone.visible_stem.conv1.weight + 1)
    before = parameter_digest(model)
    unfilled = section.model_copy(
        update={"weights": "random", "text": section.text.model_copy(update={"weights": "random"})}
    )
    load_visual_weights(model, unfilled)
    load_text_weights(model, unfilled)
    assert parameter_digest(model) == before
    model.head.bn.bias.data[0] += 1e-3
    assert parameter_digest(model) != before


@torch.no_grad()
def test_images_of_both_modalities_pass_the_shared_layers_as_one_batch() -> None:
    visible, infrared = make_images(3), make_images(2, seed=1)
    model = make_model()
    apart = torch.cat([model.encode_visible(visible), model.encode_infrared(infrared)])
    torch.testing.assert_close(model.encode_images(visible, infrared), apart, rtol=1e-5, atol=1e-5)
    swapped = torch.cat([model.encode_infrared(visible), model.encode_visible(infrared)])
    assert (swapped - apart).abs().max() > 1e-3  # two stems, not one

    together, reference = make_model().train(), make_model().train()
    found = together.encode_images(visible, infrared)
    backbone = reference.backbone
    x = torch.cat([backbone.visible_stem(visible), backbone.infrared_stem(infrared)])
    for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        x = layer(x)
    torch.testing.assert_close(found, reference.pool(x), rtol=1e-5, atol=1e-5)
    assert parameter_digest(together) == parameter_digest(reference)  # running statistics too
    other = make_model().train()
    assert (torch.cat([other.encode_visible(visible), other.encode_infrared(infrared)]) - found).abs().max() > 1e-2


@torch.no_grad()
def test_infrared_only_retrieval_stays_what_the_base_stage_ended_with() -> None:
    base_spec = ModelSpec(**{**SPEC.__dict__, "with_text": False})
    model = make_model(base_spec)
    images = make_images(4)
    raw = model.encode_infrared(images)
    before, before_visible = model.embed_infrared_only(images), model.embed_visible_only(images)
    assert torch.equal(before, model.embed(raw))  # before the text stage there is one head
    model.start_text_stage(TextModelSection(width=16, layers=2, heads=2))
    model.eval()
    assert model.spec == SPEC
    assert model.base_head is not None and model.base_head is not model.head
    model.head.bn.weight.mul_(-2.0)
    model.head.bn.bias.add_(1.0)
    assert torch.equal(model.embed_infrared_only(images), before)
    assert torch.equal(model.embed_visible_only(images), before_visible)
    torch.testing.assert_close(model.embed_base(raw), before)
    assert (model.embed(raw) - before).abs().max() > 0.05
    torch.testing.assert_close(before.norm(dim=1), torch.ones(4))


def test_the_text_tower_has_the_size_that_the_text_stage_asks_for() -> None:
    # A base model is shared by runs whose text towers differ.
    model = make_model(ModelSpec(**{**SPEC.__dict__, "with_text": False}))
    model.start_text_stage(TextModelSection(width=24, layers=1, heads=3))
    assert (model.spec.text_width, model.spec.text_layers, model.spec.text_heads) == (24, 1, 3)
    assert model.text is not None and model.text.tower.token_embedding.weight.shape[1] == 24
    assert spec_from_config(ModelSection(text={"width": 64}), 3, with_text=False) == spec_from_config(  # type: ignore[arg-type]
        ModelSection(), 3, with_text=False
    )


def make_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    pixels = {recipe: torch.from_numpy(rng.integers(0, 256, (6, 32, 16, 3), dtype=np.uint8)) for recipe in RECIPES}
    return Batch(
        labels=torch.arange(3).repeat_interleave(2),
        pixels=pixels,
        draws={recipe: draw(recipe, 6, rng, height=32, width=16, pad=2) for recipe in RECIPES},
        features={},
        tokens=tokenize([TEXTS[i % 3] for i in range(6)]),
        filter_tokens=tokenize(["a man with a bag"] * 6),
    )


def test_a_trained_gem_moves_through_fusion_alone_and_leaves_infrared_only_retrieval_as_it_was() -> None:
    model = make_model(ModelSpec(**{**SPEC.__dict__, "with_text": False}))
    images = make_images(4)
    with torch.no_grad():
        before, raw = model.embed_infrared_only(images), model.encode_infrared(images)
    model.start_text_stage(TextModelSection(width=16, layers=2, heads=2), train_pool=True)
    model.freeze_visual()
    model.train_text_stage(freeze_batch_norm=True)
    batch = make_batch(0)
    section = LossSection(filter_text=False)
    sum(StageStep(model, JointObjective(section), pad=2)(batch).values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    found = model.pool.p.grad
    assert found is not None and model.base_pool is not None and model.base_pool.p.grad is None

    # The gradient that a plain loop gives when every other feature is a constant.
    model.pool.p.grad = None
    pixels = {recipe: augment(batch.pixels[recipe], batch.draws[recipe], pad=2) for recipe in RECIPES}
    assert batch.tokens is not None
    with torch.no_grad():
        maps = model.backbone(None, pixels["infrared"])
        infrared = model.pool(maps)
        visual = [model.pool(model.backbone(pixels[recipe], None)) for recipe in ("visible", "visible_augmented")]
    text = model.encode_text(batch.tokens)
    rows = torch.cat([*visual, infrared, model.pool(maps) + text, text])
    sum(JointObjective(section)(rows, model.head(rows), batch.labels.repeat(5)).values()).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(model.pool.p.grad, found, rtol=1e-3, atol=1e-7)

    with torch.no_grad():
        model.pool.p.add_(0.5)
        model.eval()
        both = model.encode_infrared(images)
        assert both.shape == (4, 2 * model.spec.dim) and (model.current(both) - raw).abs().max() > 1e-2
        torch.testing.assert_close(model.embed_infrared_only(images), before)
        torch.testing.assert_close(model.embed(both), model.head.embed(model.current(both)))


@pytest.mark.parametrize("freeze_batch_norm", [True, False])
def test_the_text_stage_moves_text_and_head_and_no_bit_of_the_visual_part(freeze_batch_norm: bool) -> None:
    model = make_model(ModelSpec(**{**SPEC.__dict__, "with_text": False}))
    model.start_text_stage(TextModelSection(width=16, layers=2, heads=2))
    model.freeze_visual()
    step = StageStep(model, JointObjective(LossSection()), pad=2)
    optimizer = StageOptimizer(model, OptimSection())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for seed in range(3):
        model.train_text_stage(freeze_batch_norm=freeze_batch_norm)
        optimizer.zero_grad()
        torch.stack(list(step(make_batch(seed)).values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step(scaler)
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    weights = {name for name, _ in model.named_parameters()}
    assert not {key for key in moved & weights if key.startswith(("backbone.", "pool."))}
    assert not {key for key in moved if key.startswith(("base_pool.", "base_head."))}
    assert {key for key in weights if key.startswith(("text.", "head."))} <= moved
    assert {"head.bn.running_mean", "head.bn.running_var"} <= moved
    buffers = {key for key in before if key.startswith("backbone.") and key not in weights}
    assert buffers and (moved & buffers) == (set() if freeze_batch_norm else buffers)


def test_the_text_stage_trains_head_and_text_and_rests_the_kept_head() -> None:
    model = make_model()
    model.freeze_visual()
    model.train_text_stage(freeze_batch_norm=True)
    assert model.text is not None and model.base_head is not None
    assert model.head.training and model.text.training and not model.backbone.training and not model.base_head.training
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"head", "text"}
    model.train_text_stage(freeze_batch_norm=False)
    assert model.backbone.layer1.training and not model.base_head.training


@pytest.mark.parametrize("with_text", [True, False])
def test_a_saved_model_comes_back_to_the_bit(tmp_path: Path, with_text: bool) -> None:
    model = make_model(ModelSpec(**{**SPEC.__dict__, "with_text": with_text}))
    model.to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "model")
    again = TVILFM.from_pretrained(tmp_path / "model")
    assert again.spec == model.spec
    assert parameter_digest(again) == parameter_digest(model)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    images = make_images(2)
    with torch.no_grad():
        torch.testing.assert_close(again.eval().encode_visible(images), model.encode_visible(images))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_folder_without_a_file_is_refused(tmp_path: Path, name: str) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint: expected .*{name}, got none"):
        TVILFM.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{"num_classes": 4}, {"with_text": False}, {"text_layers": 1}])
def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights of .*config\.json, got"):
        TVILFM.from_pretrained(tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"config\.json: expected model_type tvilfm"):
        TVILFM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "tvilfm", "no_such_key": 1}'),
        ("model.safetensors", b"\x08"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_file(tmp_path: Path, name: str, content: bytes) -> None:
    make_model().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ": expected"):
        TVILFM.from_pretrained(tmp_path)


def test_a_model_is_read_from_the_hub_cache_by_name_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache's documented layout; offline, the hub library reads it as it would after a download.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--lab--tvilfm", "a" * 40
    model = make_model()
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    again = TVILFM.from_pretrained("lab/tvilfm", revision="v1")
    assert parameter_digest(again) == parameter_digest(model)
    for name, revision in (("lab/other", None), ("lab/tvilfm", "v2"), ("no such: name", None)):
        with pytest.raises(ValueError, match=rf"checkpoint: expected a folder .* or a repository .*got {name}"):
            TVILFM.from_pretrained(name, revision=revision)
