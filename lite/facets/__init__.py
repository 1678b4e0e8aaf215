"""The sides of the `Lite` object, one subject each; `lite.lite` puts them together."""
