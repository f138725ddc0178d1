"""The memory of a training step, against a count by hand and against a batch of another size."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from cluster.stages.memory import require_memory
from tvilfm.config import Config, load_config
from tvilfm.datasets import read_dataset
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.training.memory import step_bytes


def _config(*overrides: str) -> Config:
    return load_config(Path("ray_config.yaml"), overrides, size="tiny")


def test_a_larger_batch_needs_more_for_what_the_backward_pass_reads_and_nothing_else() -> None:
    model = TVILFM(spec_from_config(_config().model, 6, with_text=False))
    weights = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters())
    one, two = (step_bytes(_config(f"train.p={p}"), "base", 6) for p in (4, 8))
    assert 2 * one - two == weights + 3 * trained
    # Of each image, the backward pass reads at least what enters the first convolution and the first BN layer.
    config = _config("train.p=4")
    images = 3 * config.train.p * config.train.k
    pixels = config.data.height * config.data.width
    assert one - weights - 3 * trained > images * (pixels * 3 * 4 + pixels / 4 * 32 * 4)
    assert step_bytes(_config("train.p=8"), "base", 6, workers=2) == one


def test_the_text_stage_keeps_nothing_of_the_frozen_backbone() -> None:
    cached, pixels = (step_bytes(_config(f"train.text.cache_views={views}"), "text", 6) for views in (2, 0))
    assert cached == pixels  # images are encoded without a gradient
    embedding = 49408 * 32 * 4
    assert 4 * embedding < cached < 4 * embedding + step_bytes(_config(), "base", 6)


def test_the_random_stream_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    step_bytes(_config(), "text", 6)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("free", "overrides", "message"),
    [
        (1e6, (), r"^train\.p: expected a batch that fits into memory, got 4 x 2 rows of 48 x 24 .* stage base needs"),
        (1e6, ("cluster.train_workers=2",), r"for each of 2 workers; this machine has 0\.0 GB"),
        (1e12, (), None),
        (1e6, ("cluster.address=auto",), None),
        (1e6, ("cluster.gpus_per_worker=1",), None),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_the_first_stage(
    free: float, overrides: tuple[str, ...], message: str | None, tiny_benchmark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": free})
    manifest = read_dataset("synthetic", tiny_benchmark)
    if message is None:
        require_memory(_config(*overrides), manifest, ["base", "text"])
        return
    with pytest.raises(ValueError, match=message):
        require_memory(_config(*overrides), manifest, ["base", "text"])
    require_memory(_config(*overrides), manifest, ["features", "results"])  # no stage that trains is left
