"""Figures that only one notebook draws: nb04 holds those of notebook 04."""
