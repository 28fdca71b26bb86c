"""Whether a run was right: the dense model, gradients, numbers that are finite."""
