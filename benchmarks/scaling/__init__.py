"""Memory and communication of a LoFT training step on a mesh of devices (docs/scaling.md)."""
