"""Figures that only one notebook draws: nb07 holds those of notebook 07."""
