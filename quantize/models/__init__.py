"""One model: planned as its library would quantize it, and carried out."""
