"""Saving and restoring factors, inverses and progress: in checkpoints, and after a step that failed."""
