"""The cohort as a map: which tiles are drawn, where they lie, what they are coloured by, and what stands for them."""
