"""Bundled model specs, as data."""
