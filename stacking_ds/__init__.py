"""stacking_ds: pre-train BERT-style encoders by progressive stacking on DeepSpeed.

Importing this package has no side effects.
"""

__version__ = "0.1.0"
