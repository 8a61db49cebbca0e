"""A model, or a whole pipeline, in one file in the names of its own code: as checkpoints in the library's names."""
