"""How a deeper model's layers come from a shallower one's, and the moving of state that does it."""
