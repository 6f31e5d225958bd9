"""The checks of the exercises: those of notebook NN in nbNN.py. How to write one: grading.py, beside this folder."""
