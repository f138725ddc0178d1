"""Rates and decays as METHOD 4 lists them, the schedule, and token rows that no caption used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.oracles import lr_factors_loop
from tvilfm.config import OptimSection, TextModelSection
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.training.optim import TOKEN_EMBEDDING, StageOptimizer, lr_factor, parameter_groups

LR, TEXT_LR, DECAY, TEXT_DECAY = 1e-2, 1e-3, 5e-4, 4e-5
SECTION = OptimSection(lr=LR, text_lr=TEXT_LR, weight_decay=DECAY, text_weight_decay=TEXT_DECAY)
SCALER = torch.amp.GradScaler("cpu", enabled=False)


def make_model(*, text: bool, num_classes: int = 3) -> TVILFM:
    torch.manual_seed(0)
    spec = ModelSpec(
        backbone="resnet18_half", num_classes=num_classes, text_width=8, text_layers=1, text_heads=2, with_text=False
    )
    model = TVILFM(spec)
    if text:
        model.start_text_stage(TextModelSection(width=8, layers=1, heads=2))
        model.freeze_visual()
    return model


@pytest.mark.parametrize(
    ("warmup_epochs", "milestones"), [(10, (40, 60, 100)), (0, (40, 60, 100)), (1, (2,)), (10, (5, 8)), (3, ())]
)
def test_the_schedule_warms_up_and_falls_as_a_plain_loop(warmup_epochs: int, milestones: tuple[int, ...]) -> None:
    expected = lr_factors_loop(121, warmup_epochs, milestones)
    found = [lr_factor(epoch, warmup_epochs=warmup_epochs, milestones=milestones) for epoch in range(121)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_default_schedule_is_the_papers() -> None:
    assert [lr_factor(epoch) for epoch in (0, 5, 9, 10, 39, 40, 60, 100, 120)] == pytest.approx(
        [0.01, 0.505, 0.901, 1, 1, 0.1, 0.01, 0.001, 0.001]
    )


def expected_rates(name: str) -> tuple[float, float]:
    """(rate, decay) of a parameter, spelled out from METHOD 4."""
    part = name.split(".")[0]
    if part in ("backbone", "pool"):
        return LR, DECAY
    if part == "head":
        return 2 * LR, DECAY
    assert part == "text"
    if "resblocks" in name:
        return (2 * TEXT_LR, 0.0) if "bias" in name.rsplit(".", 1)[1] else (TEXT_LR, TEXT_DECAY)
    assert name.split("tower.")[1] in (
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
    )
    return LR, TEXT_DECAY


@pytest.mark.parametrize("keep_unused_tokens", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_every_trainable_parameter_is_in_one_group_at_its_rate_and_decay(text: bool, keep_unused_tokens: bool) -> None:
    model = make_model(text=text)
    section = SECTION.model_copy(update={"keep_unused_tokens": keep_unused_tokens})
    found: dict[str, tuple[float, float]] = {}
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, section):
        assert [by_id[id(parameter)] for parameter in group["params"]] == group["names"]
        for name in group["names"]:
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name: expected_rates(name) for name in trainable}
    if text and keep_unused_tokens:
        assert expected.pop(TOKEN_EMBEDDING) == (LR, TEXT_DECAY)  # the sparse optimiser's
    assert found == expected
    parts = {name.split(".")[0] for name in found}
    assert parts == ({"head", "text"} if text else {"backbone", "pool", "head"})


def test_without_a_text_decay_the_text_tower_takes_the_visual_one() -> None:
    section = SECTION.model_copy(update={"text_weight_decay": None, "keep_unused_tokens": False})
    decays = {
        name: group["weight_decay"]
        for group in parameter_groups(make_model(text=True), section)
        for name in group["names"]
    }
    assert decays[TOKEN_EMBEDDING] == decays["text.tower.transformer.resblocks.0.attn.in_proj_weight"] == DECAY
    assert decays["text.tower.transformer.resblocks.0.attn.in_proj_bias"] == 0


def test_all_optimisers_cover_all_trainable_parameters_once_and_follow_the_schedule() -> None:
    model = make_model(text=True)
    optimizer = StageOptimizer(model, SECTION)
    groups = [group for inner in optimizer._optimizers for group in inner.param_groups]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = [group["lr"] for group in groups]
    assert LR in rates and 2 * LR in rates and TEXT_LR in rates and 2 * TEXT_LR in rates
    for factor in (0.5, 0.1, 1.0):  # of the initial rate, not of the last one
        optimizer.set_lr_factor(factor)
        assert [group["lr"] for group in groups] == pytest.approx([factor * rate for rate in rates])
    assert all(group["betas"] == (0.9, 0.999) for group in groups)


def run_steps(model: TVILFM, section: OptimSection, count: int = 4) -> None:
    """Some text steps; the sentences use the rows 5, 6, 7, of which 7 only in the first step, and end in 49407."""
    optimizer = StageOptimizer(model, section)
    model.train_text_stage(freeze_batch_norm=True)
    for index in range(count):
        words = [5, 6, 7 if index == 0 else 6, 49407]
        tokens = torch.tensor([words, [6, 5, 5, 49407]])
        optimizer.zero_grad()
        logits = model.head(model.encode_text(tokens))
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
        optimizer.step(SCALER)


def token_rows(model: TVILFM) -> Tensor:
    assert model.text is not None
    return model.text.tower.token_embedding.weight.detach()


def test_unused_token_rows_stay_as_they_are_to_the_bit_and_used_ones_move() -> None:
    model = make_model(text=True)
    before = token_rows(model).clone()
    run_steps(model, SECTION)
    moved = (token_rows(model) != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == [5, 6, 7, 49407]


def test_a_token_row_rests_in_the_steps_that_do_not_use_it() -> None:
    once, longer = make_model(text=True), make_model(text=True)
    run_steps(once, SECTION, count=1)
    run_steps(longer, SECTION, count=4)
    same = (token_rows(once) == token_rows(longer)).all(dim=1)
    assert same[7] and not same[[5, 6, 49407]].any()


def test_without_keeping_them_unused_token_rows_erode() -> None:
    model = make_model(text=True)
    before = token_rows(model).clone()
    run_steps(model, SECTION.model_copy(update={"keep_unused_tokens": False}), count=8)
    after = token_rows(model)
    unused = torch.ones(len(before), dtype=torch.bool)
    unused[[5, 6, 7, 49407]] = False
    assert (after != before)[unused].any(dim=1).all()
    # Adam's first steps have the size of the rate whatever the gradient: entries of 0.02 are gone after a few.
    assert after[unused].abs().mean() < 0.7 * before[unused].abs().mean()


def test_the_used_rows_first_step_is_adams() -> None:
    section = SECTION.model_copy(update={"text_weight_decay": 0.0})
    sparse, dense = make_model(text=True), make_model(text=True)
    run_steps(sparse, section, count=1)
    run_steps(dense, section.model_copy(update={"keep_unused_tokens": False}), count=1)
    torch.testing.assert_close(token_rows(sparse), token_rows(dense), rtol=0, atol=1e-6)


@pytest.mark.parametrize("overflowing", [TOKEN_EMBEDDING, "head.classifier.weight"])
def test_a_step_that_overflows_moves_no_parameter_of_either_optimiser(overflowing: str) -> None:
    model = make_model(text=True)
    optimizer, scaler = StageOptimizer(model, SECTION), torch.amp.GradScaler("cpu", init_scale=4.0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def step(bad: str | None) -> set[str]:
        optimizer.zero_grad()
        scaler.scale(torch.zeros(()))  # starts the scaler
        for name, parameter in trained.items():
            parameter.grad = torch.ones_like(parameter)
            if name == bad:
                parameter.grad.view(-1)[0] = float("inf")
        optimizer.step(scaler)
        scaler.update()
        return {name for name, parameter in trained.items() if not torch.equal(parameter, before[name])}

    assert step(overflowing) == set()
    assert scaler.get_scale() == 2.0
    assert {TOKEN_EMBEDDING, "head.classifier.weight"} <= step(None)


def test_the_biases_of_the_text_transformer_have_a_decay_of_their_own() -> None:
    section = SECTION.model_copy(update={"text_bias_weight_decay": 0.125})
    decays = {
        name: group["weight_decay"]
        for group in parameter_groups(make_model(text=True), section)
        for name in group["names"]
    }
    decayed = {name for name, decay in decays.items() if decay == 0.125}
    assert decayed == {name for name in decays if ".transformer." in name and name.endswith("bias")}


def test_the_state_of_all_optimisers_comes_back() -> None:
    model, other = make_model(text=True), make_model(text=True)
    optimizer, restored = StageOptimizer(model, SECTION), StageOptimizer(other, SECTION)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step(SCALER)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as through a file: torch shares the tensors
    for each, stepper in ((model, optimizer), (other, restored)):
        for parameter in (p for p in each.parameters() if p.requires_grad):
            parameter.grad = torch.full_like(parameter, -0.1)
        stepper.step(SCALER)
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fresh = make_model(text=True)
    with pytest.raises(ValueError):
        StageOptimizer(fresh, SECTION).load_state_dict(optimizer.state_dict()[:1])
