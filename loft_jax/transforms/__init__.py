"""The optimizers, one a file: `scale_by_loft_*`, the core, then `loft_*`, its alias."""
