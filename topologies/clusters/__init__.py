"""Bundled clusters, as data."""
