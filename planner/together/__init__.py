"""Where it matters which experts tokens choose together: search, program and bounds."""
