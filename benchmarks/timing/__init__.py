"""Parts of speed.py: how it times, what it times it on, the peers, and the sections."""
