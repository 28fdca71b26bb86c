"""Readers of foreign topology formats, one file each."""
