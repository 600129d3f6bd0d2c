"""Cohorts, resumption, machines: the room that knows all others and that nobody imports."""
