"""What a library's own source says that its objects do not: which code reads a layer's weight."""
