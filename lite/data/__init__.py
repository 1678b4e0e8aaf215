"""Loaders that give each rank its part, and batches on their device."""
