"""Tensors in files: headers, names of weight files, shards, and the forms in which values are stored."""
