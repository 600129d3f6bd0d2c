"""Which slides and patients there are: folders, tables, labels, folds, and what their files are worth."""
