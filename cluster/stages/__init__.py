"""The stages of a run, one class per file: each declares what decides its result, and computes it."""
