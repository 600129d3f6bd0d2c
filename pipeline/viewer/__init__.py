"""A local web viewer of a work folder: `data.py` what may be seen, `server.py` how to ask for it, `static/` a page."""
