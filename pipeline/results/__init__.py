"""What a run's models say: predictions, decisions, intervals, comparisons, cohorts from elsewhere."""
