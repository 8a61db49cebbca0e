"""What a checkpoint is and would become, as values that the table and the JSON are renderings of."""
