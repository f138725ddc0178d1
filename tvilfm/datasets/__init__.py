"""Readers of the datasets, one module per dataset, and of their published caption files."""

from tvilfm.datasets.readers import read_dataset

__all__ = ["read_dataset"]
