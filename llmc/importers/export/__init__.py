"""torch.export archives (`.pt2`): read without torch, raised to the primitive ops of the graph."""
