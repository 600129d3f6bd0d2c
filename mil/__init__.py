"""features -> bags -> model -> scores: everything that touches bags of instances. Knows configs; never extract or pipeline."""
