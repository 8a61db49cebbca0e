"""What running a model shows about its weights: statistics of their inputs, scores, and what quantizing changed."""
