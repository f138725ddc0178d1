"""Search spaces for `tvilfm tune`, as YAML."""
