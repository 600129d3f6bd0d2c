"""Patients' tables beside the bags: what is fitted on a training part and applied to new patients."""
