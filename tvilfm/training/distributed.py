"""Distributed training that is equivalent to one worker: losses, BN neck and BN layers use the global batch.

Convention: every worker computes the same global loss. The backward pass of gathering sums the gradients of all
workers' losses, and DDP then averages over workers. The result is the gradient of one global loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    """Gather all workers' rows in rank order; backward sums the workers' gradients of this worker's rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * context.count :][: context.count]


class _SumOverWorkers(torch.autograd.Function):
    """Sum over workers, forward and backward."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _SumOverWorkers.forward(context, gradient.contiguous())


def gather_rows(rows: Tensor) -> Tensor:
    """Return all workers' rows in rank order, with gradient; with one worker, return the rows unchanged.

    Args:
        rows: (B, ...), with the same B on every worker.

    Returns:
        (B x workers, ...).
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows.contiguous())
    return gathered


def _sum_over_workers(values: Tensor) -> Tensor:
    total: Tensor = _SumOverWorkers.apply(values)
    return total


def average_rows(table: nn.Parameter, rows: Tensor) -> None:
    """Average every future gradient of a lookup table over all workers, and send only the rows that are ever read.

    A table that DDP averages is sent whole in every step: 100 MB for the tokens of CLIP, of which captions of people
    use a few per cent.

    Args:
        table: (V, D) parameter that DDP ignores; the values of worker 0 are copied to all.
        rows: int64, sorted: the rows that any batch of any worker reads, the same on all workers.
    """
    rows = rows.to(table.device)
    slots_V = torch.zeros(len(table), dtype=torch.int64, device=table.device)
    slots_V[rows] = torch.arange(len(rows), device=table.device)
    dist.broadcast(table.data, 0)

    def average(table: Tensor) -> None:
        gradient = table.grad
        assert gradient is not None
        if gradient.is_sparse:
            values = gradient._values()
            sent = values.new_zeros(len(rows), values.shape[1])
            sent.index_add_(0, slots_V[gradient._indices()[0]], values)
        else:
            sent = gradient[rows]
        dist.all_reduce(sent)
        sent /= world_size()
        if gradient.is_sparse:
            table.grad = torch.sparse_coo_tensor(
                rows[None], sent, gradient.shape, is_coalesced=True, check_invariants=False
            )
        else:
            gradient[rows] = sent

    table.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with statistics over all workers' rows.

    torch's SyncBatchNorm does the same on CUDA, but does not support CPU tensors.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        count = input.numel() // input.shape[1] * world_size()
        mean = _sum_over_workers(input.sum(dim=(0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _sum_over_workers(centred.pow(2).sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        normalised = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return torch.addcmul(self.bias[:, None, None], normalised, self.weight[:, None, None])


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Convert a module's BatchNorm2d layers in place to use the statistics of all workers.

    Parameters and names do not change.
    """
    if world_size() == 1:
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if device.type == "cuda":
                module.add_module(name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
            else:
                child.__class__ = GlobalBatchNorm2d
        else:
            synchronise_batch_norm(child, device)
