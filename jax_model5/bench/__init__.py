"""How fast this machine trains Model 5, and how fast PyTorch does the same work on it."""
