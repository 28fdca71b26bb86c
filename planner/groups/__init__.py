"""Which GPUs form the EP group, or several equal ones."""
