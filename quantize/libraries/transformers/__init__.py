"""What transformers would do with a model: its class, what it skips, and what it saves under which names."""
