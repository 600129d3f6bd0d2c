"""Other programs' formats, in and out: features, bags, checkpoints, annotations."""
