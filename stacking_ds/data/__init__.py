"""Raw English text -> WordPiece vocabulary -> token shards -> deterministic global batches.

Read in this order: sources, embedded, tokenizer, prepare, manifest, shards, counter_random,
samples, masking, batches, loader, unigram.
"""
