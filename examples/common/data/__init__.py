"""Datasets: loading, held-out splits, and the loss on a batch."""
