"""What a model folder holds: config, index, headers, quantized weights, pipelines, and what is wrong with them."""
