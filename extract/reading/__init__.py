"""Tiles' pixels, as fast as the file gives them: readers, read-ahead, staging, stain."""
