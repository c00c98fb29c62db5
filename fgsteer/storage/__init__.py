"""Files that are written in full or not at all, long work in resumable shards, locks, and the network."""
