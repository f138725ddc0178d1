"""Two processes equal one, to rounding in float64: losses, gradients, weights and BN statistics."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tvilfm.config import load_config
from tvilfm.data.pixels import decode_files
from tvilfm.data.tri_modal import TrainingRows, TriModalDataset
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_published
from tvilfm.losses.objective import JointObjective
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.training import step as step_module
from tvilfm.training.distributed import synchronise_batch_norm
from tvilfm.training.loop import distributed
from tvilfm.training.optim import StageOptimizer
from tvilfm.training.step import StageStep

HEIGHT, WIDTH, PAD, STEPS = 48, 24, 2, 5


def _train(rank: int, world_size: int, port: int, root: Path, stage: str, target: Path) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    augment = step_module.augment
    step_module.augment = lambda pixels, draws, pad: augment(pixels, draws, pad=pad).double()  # type: ignore[assignment]
    try:
        manifest = read_dataset("synthetic", root)
        pixels = decode_files(root, manifest["image"].to_pylist(), height=HEIGHT, width=WIDTH)
        rows = TrainingRows.from_manifest(manifest, use_val=False)
        overrides = ["optim={lr: 1.0e-3, text_lr: 1.0e-3}", "loss.center_weight=0.1"]
        config = load_config(Path("ray_config.yaml"), overrides, size="tiny")
        torch.manual_seed(0)
        model = TVILFM(spec_from_config(config.model, rows.num_classes, with_text=False))
        captions = None
        if stage == "text":
            model.start_text_stage(config.model.text)
            captions = read_published(root, manifest)
        model.double()
        if stage == "text":
            model.freeze_visual()
            # Statistics that move are the harder case: with frozen ones no BN layer has to be synchronised.
            model.train_text_stage(freeze_batch_norm=False)
        else:
            model.train()
        synchronise_batch_norm(model.backbone, torch.device("cpu"))
        step = StageStep(model, JointObjective(config.loss), pad=PAD)
        optimizer = StageOptimizer(model, config.optim)
        dataset = TriModalDataset(
            rows, manifest, pixels, pad=PAD, seed=0, rank=rank, world_size=world_size, captions=captions
        )
        cpu = torch.device("cpu")
        wrapped = distributed(step, config.loss, cpu, dataset.token_ids()) if world_size > 1 else step
        sent = _count_sent(wrapped) if world_size > 1 else []
        record = []
        sampler = rows.sampler(3, 2, seed=0)  # two workers share the images of the second identity
        for batch, _ in zip(sampler, range(STEPS), strict=False):
            optimizer.zero_grad()
            terms = wrapped(dataset[batch])
            torch.stack(list(terms.values())).sum().backward()
            gradients = {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}
            record.append(({name: term.item() for name, term in terms.items()}, gradients))
            optimizer.step(torch.amp.GradScaler("cpu", enabled=False))
        if rank == 0:
            torch.save((record, model.state_dict(), sent, _sizes(model, dataset)), target)
    finally:
        step_module.augment = augment
        if world_size > 1:
            dist.destroy_process_group()


def _count_sent(wrapped: nn.Module) -> list[int]:
    """Bytes of every gradient that is averaged from now on: DDP's buckets, and what is sent besides."""
    sent: list[int] = []

    def counted_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    counted_bucket.__annotations__ = {}  # DDP compares types, which are texts here
    wrapped.register_comm_hook(None, counted_bucket)
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
        if tensor.ndim == 2 and tensor.shape[1] == 32:  # rows of the token embedding; sums of BN layers have one axis
            sent.append(tensor.nbytes)
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    return sent


def _sizes(model: TVILFM, dataset: TriModalDataset) -> dict[str, int]:
    """Bytes of the gradients of all trained parameters, of the token embedding, and of its rows that captions read."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    if model.text is None:
        return {"trained": trained, "table": 0, "rows": 0}
    weight = model.text.tower.token_embedding.weight
    return {"trained": trained, "table": weight.nbytes, "rows": len(dataset.token_ids()) * weight[0].nbytes}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "text"])
def test_two_processes_equal_one(stage: str, tiny_benchmark: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _train(0, 1, 0, tiny_benchmark, stage, tmp_path / "one.pt")
    torch.multiprocessing.spawn(_train, args=(2, port, tiny_benchmark, stage, tmp_path / "two.pt"), nprocs=2)

    (one, one_state, *_), (two, two_state, sent, sizes) = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert len(one) == STEPS
    for (one_terms, one_gradients), (two_terms, two_gradients) in zip(one, two, strict=True):
        assert one_terms.keys() == two_terms.keys() == {"id", "wrt", "center"}
        for name, value in one_terms.items():
            assert two_terms[name] == pytest.approx(value, abs=1e-6)  # cross-entropy runs in float32
        assert one_gradients.keys() == two_gradients.keys()
        for name, gradient in one_gradients.items():
            torch.testing.assert_close(
                two_gradients[name], gradient, rtol=1e-5, atol=1e-8 * float(gradient.abs().max())
            )
    # Of the token embedding, only the rows of the captions are sent, and nothing of what is frozen.
    assert sum(sent) == len(two) * (sizes["trained"] - sizes["table"] + sizes["rows"])
    assert stage == "base" or 0 < sizes["rows"] < sizes["table"] / 100
    for name, value in one_state.items():
        torch.testing.assert_close(two_state[name], value, rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
