"""A module for each command: options in, one call of ``qz.api``, its report out."""
