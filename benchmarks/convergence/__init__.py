"""`make race`: KFACAdam, K-FAC and their peers at equal tuning budgets, on small problems, over three seeds."""
