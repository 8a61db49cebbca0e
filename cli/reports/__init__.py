"""What commands tell: the value that one returned as a table, as Markdown, as an HTML page or a picture."""
