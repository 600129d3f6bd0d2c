"""One opened slide: its container, its levels, its µm per px, its identity."""
