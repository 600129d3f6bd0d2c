"""What lies in a work folder: layout, reading, writing, seals, and who makes what."""
