"""What a folder or a file holds in the place of a model that the libraries load, and what to do with it."""
