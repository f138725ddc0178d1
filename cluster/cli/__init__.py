"""The `tvilfm` command, one file per group of commands."""
