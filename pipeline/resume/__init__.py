"""One resumable stage: its plan, its claims, its runner, its log."""
