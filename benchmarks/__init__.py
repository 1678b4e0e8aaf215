"""Measurements behind the project's claims; run each with `python -m benchmarks.NAME`."""
