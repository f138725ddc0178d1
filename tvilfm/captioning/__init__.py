"""Modality-specific captioning: from a picture to a sentence, without colours for infrared (METHOD 5)."""
