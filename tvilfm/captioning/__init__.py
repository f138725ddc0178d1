"""Modality-specific captioning: one sentence per image, without colour words for infrared images (METHOD 5)."""
