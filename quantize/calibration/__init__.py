"""What a model's inputs say about its weights: statistics of a calibration, read, written and imported."""
