"""Ray jobs around `tvilfm`: resources, data movement, restarts. No formulas."""
