"""Replicas: how many of which expert, where, and what share each takes."""
