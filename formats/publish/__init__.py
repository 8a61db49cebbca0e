"""Checkpoints on their way to the Hub: what is sent, the model card, the upload."""
