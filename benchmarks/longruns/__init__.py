"""Long fine-tuning runs: where the rank binds, and how far renewals reach beyond it."""
