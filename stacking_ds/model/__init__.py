"""The BERT that is trained: configuration, modules, losses and its names at Hugging Face."""
