"""Tables of patients (clinical, molecular), from a file's cells to the rows of a run's patients."""
