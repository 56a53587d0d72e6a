"""`make race`: K-FAC against tuned AdamW on three small problems, over three seeds."""
