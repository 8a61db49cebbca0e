"""Every argument and option of every command, declared once: a module for each panel of the help."""
