"""Which trainings a run has, one training of one fold, and the bundle it leaves."""
