"""From texts to activations: tokens and which of them are meant, batches, and forward passes that stop early."""
