"""Repositories on the Hugging Face Hub, read by byte ranges."""

from qz import UsageError

try:
    import huggingface_hub.constants  # noqa: F401 - it reads the environment when it is imported
except ValueError as error:
    raise UsageError(
        f"huggingface_hub cannot be imported: {error}. Correct or unset the environment variable with this value; its "
        "name begins with HF_."
    ) from None
