"""Values computed from the forms in which other tools store them, in chunks: a reader for each encoding."""
