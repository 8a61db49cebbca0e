"""What running a model tells of its weights: statistics of their inputs, scores, and what quantizing changed."""
