"""Layers and masks that the models of several papers share."""
