"""Corpora: the card, the index of its shards, the order of an epoch, decoding, and the loader that joins them."""
