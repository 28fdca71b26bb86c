"""What `epplan bench` times, and the ceilings beside it."""
