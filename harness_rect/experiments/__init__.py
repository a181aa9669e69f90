"""Experiments: running them (sweep), reading lm-eval's results files, comparing and reporting them."""
