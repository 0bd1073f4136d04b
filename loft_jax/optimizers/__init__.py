"""The LoFT optimizers as Optax transformations, one algorithm a file."""
