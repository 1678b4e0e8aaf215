"""How the objects that a user hands to `Lite.setup` are prepared, in place, and restored."""
