"""What a layer is made of: norms, attention with its cache, router, experts."""
