"""Makes the helpers importable from the repository root: `from examples.common import ...`."""
