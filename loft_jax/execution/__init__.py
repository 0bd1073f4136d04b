"""How the step of one pair runs over a model: grouped, batched, chunked, on meshes.

`update.py` maps `loft_jax.algorithm.step` over all pairs of a tree; the other modules each take
care of one concern.
"""
