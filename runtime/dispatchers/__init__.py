"""Taking rows to the ranks of their experts and back, beside the computation."""
