"""Raw English text -> WordPiece vocabulary -> token shards -> rows -> deterministic global batches.

Read in this order: sources, embedded, tokenizer, given_vocabulary, prepare, manifest, shards,
counter_random, examples, packing, layout, layout_store, masking, batches, assembly, loader,
unigram.
"""
