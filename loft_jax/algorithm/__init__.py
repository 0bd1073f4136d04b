"""The mathematics of LoFT as pure functions of matrices; start with `step.py`.

Nothing here knows of pytrees, layers, devices or Optax: one pair of factors, two matrices.
"""
