"""Readers of datasets, one file per dataset, and their published caption files."""

from tvilfm.datasets.readers import read_dataset

__all__ = ["read_dataset"]
