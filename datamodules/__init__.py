"""Data for training: shards in, dictionaries of batches out."""
