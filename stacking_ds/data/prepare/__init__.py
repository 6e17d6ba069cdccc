"""Text to a folder of token shards. Read in this order: plan, tokenizing, unit, folder, session,
vocabulary, finish, reuse, worker, workers, run."""
