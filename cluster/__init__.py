"""Ray jobs that run the `tvilfm` library: resources, data transfer and restarts, but no formulas."""
