"""What an optimizer has learned: into a checkpoint and back, and back to before a step that failed."""
