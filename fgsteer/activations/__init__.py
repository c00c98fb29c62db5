"""From texts to activations: tokens and which of them are meant, batches, and truncated forward passes."""
