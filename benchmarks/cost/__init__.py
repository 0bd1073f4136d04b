"""What LoFT costs: time, memory, compilation and precision (docs/cost.md)."""
