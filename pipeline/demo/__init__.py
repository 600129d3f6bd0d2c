"""The painted cohort of `pipeline demo`, and the demo itself."""
