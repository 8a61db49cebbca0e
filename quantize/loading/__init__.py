"""What qz wrote as a model or pipeline of its library, also where the library alone cannot load it."""
