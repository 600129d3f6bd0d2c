"""What people look at without the program: layers over slides, figures, the report."""
