"""How shards of a sequence meet."""
