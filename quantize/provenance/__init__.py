"""What a run was asked for and what it is made of: for the record, for resuming, and for an output that is there."""
