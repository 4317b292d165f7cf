"""Benches: nothing is timed before it is checked, and every number is a row in bench/results/."""
