"""Device and transfer profiles, as data."""
