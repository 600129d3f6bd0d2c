"""What may be set: the schema of every setting, the presets, and the look-up of plug-ins by file name."""
