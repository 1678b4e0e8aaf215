"""Optimizers and schedulers as the module configures them, and when they step."""
