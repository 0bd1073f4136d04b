"""Matrix factorization: the paper's Figure 2 and its lemmas (docs/results.md)."""
