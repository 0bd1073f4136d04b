"""A fine-tuned model in the programs that serve it."""
