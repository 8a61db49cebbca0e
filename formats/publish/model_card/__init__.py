"""The model card of what is pushed: its facts, its text and the lines that load the model."""
