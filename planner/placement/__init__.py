"""One layer on its GPUs: linear rows, search, integer program by topology levels."""
