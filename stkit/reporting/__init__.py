"""What we learn: scores, plots and the report."""
