"""Comparisons of whole runs whose tables stand in docs/results/; started from a checkout."""
