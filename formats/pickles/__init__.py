"""PyTorch's pickled checkpoints, of which nothing is run: where their tensors lie, in both forms of the files."""
