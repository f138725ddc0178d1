"""The released checkpoint layout, built from METHOD 10 and torchvision's names, not from the module's own table."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from tvilfm.models import TVILFM, ModelSpec
from tvilfm.models.released import load_released, released_state_dict, write_released

State = dict[str, Tensor]
Make = Callable[[tuple[int, ...]], Tensor]
DIM, CLASSES = 2048, 206


def cheap(shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape that holds one number."""
    return torch.full((), 0.5).expand(shape)


def released(
    make: Make, *, stage: str = "text", width: int = 512, layers: int = 12, vocabulary: int = 49408, tower: bool = True
) -> State:
    """A state dict of the released layout, key by key as METHOD 10 lists them."""
    with torch.device("meta"):
        resnet = torchvision.models.resnet50().state_dict()
    counter = torch.tensor(7)
    state: State = {}

    def put(key: str, shape: tuple[int, ...]) -> None:
        state[key] = counter.clone() if key.endswith("num_batches_tracked") else make(shape)

    for stem in ("rgb_model", "ir_model"):
        for name, value in resnet.items():
            for index, part in enumerate(("conv1.", "bn1.")):
                if name.startswith(part):
                    put(f"base_model.visual.{stem}.resnet_conv.{index}.{name.removeprefix(part)}", tuple(value.shape))
    for name, value in resnet.items():
        if name.startswith("layer"):
            number, _, rest = name.removeprefix("layer").partition(".")
            put(f"base_model.visual.shared_model.resnet_conv.{int(number) - 1}.{rest}", tuple(value.shape))
    put("base_model.visual.GEM.p", (1,))
    if tower:
        put("base_model.positional_embedding", (77, width))
        put("base_model.text_projection", (width, DIM))
        put("base_model.token_embedding.weight", (vocabulary, width))
        for block in range(layers):
            prefix = f"base_model.transformer.resblocks.{block}."
            for name, shape in (
                ("ln_1.weight", (width,)),
                ("ln_1.bias", (width,)),
                ("attn.in_proj_weight", (3 * width, width)),
                ("attn.in_proj_bias", (3 * width,)),
                ("attn.out_proj.weight", (width, width)),
                ("attn.out_proj.bias", (width,)),
                ("ln_2.weight", (width,)),
                ("ln_2.bias", (width,)),
                ("mlp.c_fc.weight", (4 * width, width)),
                ("mlp.c_fc.bias", (4 * width,)),
                ("mlp.c_proj.weight", (width, 4 * width)),
                ("mlp.c_proj.bias", (width,)),
            ):
                put(prefix + name, shape)
        put("base_model.ln_final.weight", (width,))
        put("base_model.ln_final.bias", (width,))
    for head in ("classifier", "backup_classifier"):
        if head == "backup_classifier":
            if stage == "base":
                continue
            put("backup_pool.p", (1,))
        for name in ("weight", "bias", "running_mean", "running_var"):
            put(f"{head}.BN.{name}", (DIM,))
        put(f"{head}.BN.num_batches_tracked", ())
        put(f"{head}.classifier.weight", (CLASSES, DIM))
    state["logit_scale"] = torch.tensor(4.25)
    return state


def small(stage: str = "text", **values: bool) -> State:
    """The full visual part with a tower of one narrow layer, for the faults."""
    return released(cheap, stage=stage, width=64, layers=1, **values)


def noise() -> Make:
    generator = torch.Generator().manual_seed(0)
    return lambda shape: torch.rand(shape, generator=generator)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        first[key].dtype == second[key].dtype
        and first[key].shape == second[key].shape
        and first[key]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(second[key].contiguous().view(-1).view(torch.uint8))
        for key in first
    )


def test_a_full_size_text_stage_file_loads_strictly_and_round_trips_byte_for_byte(tmp_path: Path) -> None:
    state = released(noise())
    source, target = tmp_path / "a" / "model.pth", tmp_path / "b" / "model.pth"
    source.parent.mkdir()
    torch.save(state, source)
    model = load_released(source, num_classes=CLASSES)
    assert model.spec == ModelSpec(
        backbone="resnet50",
        num_classes=CLASSES,
        text_width=512,
        text_layers=12,
        text_heads=8,
        with_text=True,
        trained_pool=True,  # p differs from that of the kept copy
    )
    untrained = load_released({**state, "backup_pool.p": state["base_model.visual.GEM.p"]})
    assert not untrained.spec.trained_pool
    for ours, theirs in (
        ("backbone.visible_stem.conv1.weight", "base_model.visual.rgb_model.resnet_conv.0.weight"),
        ("backbone.infrared_stem.bn1.running_var", "base_model.visual.ir_model.resnet_conv.1.running_var"),
        ("backbone.layer1.0.downsample.1.bias", "base_model.visual.shared_model.resnet_conv.0.0.downsample.1.bias"),
        ("backbone.layer4.2.conv3.weight", "base_model.visual.shared_model.resnet_conv.3.2.conv3.weight"),
        ("pool.p", "base_model.visual.GEM.p"),
        ("head.bn.running_mean", "classifier.BN.running_mean"),
        ("head.classifier.weight", "classifier.classifier.weight"),
        ("text.tower.token_embedding.weight", "base_model.token_embedding.weight"),
        ("text.tower.transformer.resblocks.11.attn.in_proj_weight",) * 2,
        ("text.tower.text_projection", "base_model.text_projection"),
        ("base_pool.p", "backup_pool.p"),
        ("base_head.classifier.weight", "backup_classifier.classifier.weight"),
    ):
        theirs = theirs.replace("text.tower.", "base_model.")
        assert torch.equal(model.state_dict()[ours], state[theirs]), ours
    assert len(model.state_dict()) + 1 == len(state)
    write_released(model, target, stage="text")
    identical = target.read_bytes() == source.read_bytes()
    assert same(torch.load(target, weights_only=True), state)
    source.unlink()
    target.unlink()
    assert identical


@pytest.mark.parametrize("tower", [True, False])
def test_a_base_stage_file_round_trips_and_starts_the_text_stage_from_its_own_head(tower: bool) -> None:
    make = noise()
    state = released(make, stage="base", width=64, layers=1, vocabulary=49408, tower=tower)
    model = load_released(state)
    assert model.spec.with_text == tower
    assert same(released_state_dict(model, stage="base"), state)
    if not tower:
        with pytest.raises(ValueError, match=r"stage: expected base for a model without a text tower, got text"):
            released_state_dict(model, stage="text")
        return
    assert model.base_head is not None and model.base_pool is not None
    assert torch.equal(model.base_head.classifier.weight, model.head.classifier.weight)
    assert torch.equal(model.base_pool.p, model.pool.p)
    model.base_pool.p.data += 1  # a copy, not the same tensor
    assert not torch.equal(model.base_pool.p, model.pool.p)
    text = released_state_dict(model, stage="text")
    assert torch.equal(text["backup_classifier.BN.bias"], state["classifier.BN.bias"])


def test_the_state_dict_given_is_copied_not_shared() -> None:
    state = released(noise(), stage="base", tower=False)
    before = state["classifier.classifier.weight"].clone()
    load_released(state).head.classifier.weight.data.zero_()
    assert torch.equal(state["classifier.classifier.weight"], before)


def test_another_order_and_half_precision_survive_the_round_trip() -> None:
    state = dict(reversed(released(noise(), stage="base", width=64, layers=1).items()))
    key = "base_model.text_projection"
    state[key] = state[key].half()
    model = load_released(state)
    assert model.text is not None and model.text.tower.text_projection.dtype == torch.float32
    assert same(released_state_dict(model, stage="base"), state)
    model.text.tower.text_projection.data += 1e-5  # trained on: half would round it
    assert released_state_dict(model, stage="base")[key].dtype == torch.float32


def test_a_model_of_ours_is_written_in_the_released_layout() -> None:
    spec = ModelSpec(backbone="resnet50", num_classes=CLASSES, text_width=64, text_layers=1, text_heads=1)
    model = TVILFM(spec)
    written = released_state_dict(model, stage="text")
    assert {key: value.shape for key, value in written.items()} == {k: v.shape for k, v in small().items()}
    assert list(released_state_dict(model, stage="base")) == [key for key in written if not key.startswith("backup_")]
    assert math.isclose(written["logit_scale"].item(), math.log(1 / 0.07), rel_tol=1e-6)
    again = load_released(written)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "key",
    [
        "base_model.visual.ir_model.resnet_conv.1.running_mean",
        "base_model.visual.GEM.p",
        "base_model.token_embedding.weight",
        "base_model.transformer.resblocks.0.mlp.c_fc.bias",
        "classifier.classifier.weight",
        "backup_classifier.BN.weight",
        "logit_scale",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    state = small()
    del state[key]
    with pytest.raises(ValueError, match=rf"checkpoint: .*{key}.* missing and no key unknown"):
        load_released(state)


@pytest.mark.parametrize("key", ["base_model.visual.fc.weight", "backup_classifier.BN.extra", "ema.decay", "module.p"])
def test_an_extra_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint: .* no key missing and {key} unknown"):
        load_released(small() | {key: torch.zeros(1)})


def test_the_text_tower_is_there_whole_or_not_at_all() -> None:
    state = {key: value for key, value in small("base").items() if "ln_final" not in key}
    with pytest.raises(ValueError, match=r"base_model.ln_final.weight, base_model.ln_final.bias missing"):
        load_released(state)


def test_other_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        resnet = torchvision.models.resnet50().state_dict()
    state = {key: cheap(tuple(value.shape)) for key, value in resnet.items()}
    with pytest.raises(ValueError, match=r"rgb_model.resnet_conv.0.weight, .* missing and conv1.weight, .* unknown"):
        load_released(state)
    with pytest.raises(ValueError, match=r"missing and module.base_model.visual.rgb_model.resnet_conv.0.weight, "):
        load_released({f"module.{key}": value for key, value in small().items()})
    path = tmp_path / "wrapped.pth"
    torch.save({"net": {"p": torch.zeros(1)}, "epoch": 3}, path)
    with pytest.raises(ValueError, match=r"expected a plain state dict of tensors, got one that holds 'net', 'epoch'"):
        load_released(path)
    for content in (b"no checkpoint", b"", path.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint: expected a pickled state dict, got .*wrapped.pth"):
            load_released(path)
    with pytest.raises(ValueError, match=r"checkpoint: expected a released state-dict file, got .*nowhere.pth"):
        load_released(tmp_path / "nowhere.pth")


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return print, ("executed",)


def test_a_file_with_code_in_it_is_refused_unrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    torch.save({"p": Evil()}, buffer)
    (tmp_path / "evil.pth").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"which weights_only loading refuses"):
        load_released(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


def test_a_misshapen_or_diverged_weight_is_named() -> None:
    state = small()
    state["base_model.ln_final.bias"] = torch.zeros(65)
    with pytest.raises(ValueError, match=r"checkpoint.base_model.ln_final.bias: expected shape \(64,\), got \(65,\)"):
        load_released(state)
    state = small()
    state["classifier.BN.running_var"] = torch.full((DIM,), math.nan)
    with pytest.raises(ValueError, match=r"checkpoint.classifier.BN.running_var: expected finite weights, got NaN"):
        load_released(state)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_classes: expected the checkpoint's 206 training identities, got 395"):
        load_released(small(), num_classes=395)
