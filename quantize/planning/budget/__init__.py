"""Which linears stay at 16 bit, for a size that a model may have or a loss that it may take."""
