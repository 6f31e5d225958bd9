"""The figure of notebook 19: what 8-bit states do to a parameter without gradient, and to one whose gradient is negative."""

import numpy as np

from tinylora.figures.style import COLOURS, canvas


def two_effects(fall, shorter):
    """Both against the step.

    fall     {"CPU" and "GPU": the parameter after step 0, 1, …}
    shorter  {"CPU" and "GPU": a step for the gradient −1 over one for +1, from step 1 on}
    """
    figure, (left, right) = canvas(9.8, 3.6, ncols=2)
    marks = {"CPU": (COLOURS[2], "o", "-"), "GPU": (COLOURS[0], "s", "--")}
    for name, values in fall.items():
        colour, mark, line = marks[name]
        left.plot(np.asarray(values) * 1e4, line, marker=mark, markevery=20, color=colour, ms=5)
        says = f"{name}'s rule: −{-values[-1] * 1e4:.1f}e-4" if values[-1] else f"{name}'s rule: 0"
        left.annotate(says, (60, values[60] * 1e4), (6, 6), textcoords="offset points", color=colour, fontsize=10)
    left.set(xlabel="step", ylabel="parameter, 1e-4", ylim=(-5.3, 0.9))
    left.set_title(f"Without a gradient, a parameter falls by {-fall['CPU'][-1] * 1e4:.1f}e-4 on a CPU", fontsize=10)
    for name, values in shorter.items():
        colour, mark, line = marks[name]
        wide = 9 if name == "GPU" else 4.5
        hollow = {"mfc": "none"} if name == "GPU" else {}
        at = np.arange(1, len(values) + 1)
        right.plot(at, values, line, marker=mark, markevery=6, color=colour, ms=wide, label=f"{name}'s rule", **hollow)
    end = shorter["CPU"][-1]
    right.annotate(f"{end:.2f}", (len(values), end), (0, 9), textcoords="offset points", ha="center", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    right.set(xlabel="step", ylabel="step for −1 / step for +1", ylim=(0.928, 1.004))
    right.set_title(f"For the gradient −1, steps shrink to {end:.2f} of those for +1", fontsize=10)
    return figure
