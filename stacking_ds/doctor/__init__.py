"""Is this cluster fit for the run: what differs between the nodes, and what is missing on them."""
