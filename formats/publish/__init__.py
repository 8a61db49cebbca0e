"""Checkpoints on their way to the Hub: what is sent, the model card, the upload."""

import qz.formats.hub  # noqa: F401 - says what in the environment keeps huggingface_hub from being imported
