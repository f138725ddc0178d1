"""The stages of a run, one class per file: what decides a result, and how it is made."""
