"""Files as they are written: where everything lies, read back, and pieces of what is not finished."""
