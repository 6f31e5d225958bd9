"""The benchmark: libraries side by side on a CPU, and checkouts of tinylora beside each other. `python -m tests.bench --help` says how.

rows           which contestants stand against each other at which sizes, and what ratios are wanted
contestants    what each contestant does: functions that run in a process of their own
worker         that process: it sets up once, waits, and runs a burst when it is told to
measure        the other end: starts the processes, lets them take turns, and takes medians of ratios
report         the tables, the JSON that `tinylora figures bench` draws from, and the figure
command        the command line
"""
