"""What a run measures while it computes: losses, and values that are NaN or infinite."""
