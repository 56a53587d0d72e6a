"""Each kernel against its memory and arithmetic bound, and against what a user would write."""
