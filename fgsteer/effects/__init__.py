"""Effect approximators: which features of generated text a steering vector moves (SAE-TS)."""
