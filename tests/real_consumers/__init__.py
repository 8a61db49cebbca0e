"""The reading code of those that load bitsandbytes checkpoints, run on what qz writes: `make consumers`.

vLLM, SGLang, InvokeAI and unsloth cannot be installed beside qz (they need a GPU, or other versions of torch), but what
they do with a checkpoint's tensors is Python: functions are taken out of the published wheels and run on the CPU.
"""
