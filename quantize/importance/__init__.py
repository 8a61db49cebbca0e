"""What is known of the inputs of weights: statistics, read, written and imported, and what they mean for a plan."""
