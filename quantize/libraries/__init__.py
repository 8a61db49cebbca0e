"""What transformers and diffusers say of a model: which linears are replaced, under which names it is saved."""
