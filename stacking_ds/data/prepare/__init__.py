"""Text to a folder of token shards. Read in this order: plan, tokenizing, unit, vocabulary, finish,
folder, reuse, session, worker, workers, run."""
