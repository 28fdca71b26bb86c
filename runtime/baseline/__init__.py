"""The same weights as tensor and pipeline parallelism."""
