"""Models in Flax nnx, and their pretrained weights."""
