"""What diffusers would do with a model: its class and what it skips."""
