"""Search spaces of `tvilfm tune`, as YAML files."""
