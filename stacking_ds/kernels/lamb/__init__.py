"""The LAMB step in two passes over flat tensors; between them the sums of squares meet."""
