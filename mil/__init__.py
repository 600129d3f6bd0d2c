"""features -> bags -> model -> scores: all that touches bags of instances. Knows configs; never extract or pipeline."""
