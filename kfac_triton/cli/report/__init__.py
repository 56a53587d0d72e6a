"""`kfac-triton report`: a run's log of diagnostics as text and as a picture."""
