"""Tissue to tiles: the grid, drawn regions, artefacts, the overlay."""
