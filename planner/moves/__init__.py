"""From one plan to the next: rebalance and replan with the fewest experts moved."""
