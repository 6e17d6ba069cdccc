"""stacking_ds: pre-train BERT-style encoders by progressive stacking on DeepSpeed.

Read in this order: stages, config, data, model, optim, fragments, growth, zero, engine,
checkpoint, trainer. Importing this package has no side effects.
"""

__version__ = "0.1.0"
