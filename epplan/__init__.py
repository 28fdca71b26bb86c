"""epplan: topology-aware expert placement planner and launcher for Mixture-of-Experts models."""

__version__ = "0.1.0"
