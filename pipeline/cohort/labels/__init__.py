"""A table of labels, from a file's cells to the rows of slides and patients."""
