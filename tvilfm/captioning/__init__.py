"""Modality-specific captioning: a sentence per image, without colours for infrared (METHOD 5)."""
