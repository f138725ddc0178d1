"""The manifest, captions, pixels, transforms and batches: what every dataset becomes."""
