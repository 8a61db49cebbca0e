"""Who loads what qz writes, and what each of them needs of a checkpoint."""
