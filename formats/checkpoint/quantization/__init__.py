"""What bitsandbytes left in a checkpoint: its config, quantized weights and quant states, and whether they fit."""
