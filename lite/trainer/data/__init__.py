"""Where a run's batches come from."""
