"""What goes where: model, traffic, cost, integer program, plan."""
