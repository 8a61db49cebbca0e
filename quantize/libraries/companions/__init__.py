"""What the files beside a model are loaded as: classes that they name, and tokenizers. Nothing is imported for it."""
