"""LoRAs that are fused into a model's weights while those are read: which tensors they change, and how."""
