"""What only the notebooks need: shared experiments, checks on parameters, statistics, figures, reports."""
