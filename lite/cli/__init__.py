"""The command line: `python -m lite`."""
