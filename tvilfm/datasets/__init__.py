"""Readers, captions, transforms and batches: from a dataset's folder to what a training step eats."""

from tvilfm.datasets.readers import read_dataset

__all__ = ["read_dataset"]
