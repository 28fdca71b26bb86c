"""What the cluster is: graph, hardware profiles, routes, readers, bundled clusters."""
