"""One output from one or several plans: its folders, its parts, the order of its shards, and reading it back."""
