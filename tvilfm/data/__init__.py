"""The common form of all datasets: manifest, captions, pixels, transforms and batches."""
