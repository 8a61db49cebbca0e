"""What can be said of a finished output to others: an in-toto statement, and the signature of model-signing."""
