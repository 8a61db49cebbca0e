"""What a conversion did, as dataclasses that print as JSON: of one model, of a pipeline, of an output that is there."""
