"""Fused operations: each has a plain torch reference, fast forms, and one place that chooses."""
