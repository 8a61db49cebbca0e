"""The headline figures: one script each, side by side with the libraries. ``make bench`` runs them all."""
