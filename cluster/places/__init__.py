"""Storage in local folders and object stores: check it, and copy the folders of runs to it."""
