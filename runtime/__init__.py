"""The processes: router, dispatch, experts, attention, worker. Reads the plan, never the solver."""
