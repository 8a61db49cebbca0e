"""Whether an output is what a source becomes: recomputed, and compared tensor by tensor."""
