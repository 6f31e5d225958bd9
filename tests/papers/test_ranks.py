"""What `tinylora ranks` prints of its runs."""

from types import SimpleNamespace

from tinylora.papers import ranks


def printed(**after):
    """The lines below the name of the layers, of {"r1": bits per byte of each seed, …}."""
    runs = {
        ("all", int(r[1:])): [SimpleNamespace(after=a, trainable=10 * int(r[1:])) for a in values]
        for r, values in after.items()
    }
    return ranks.describe(runs).split("\nall\n")[1].splitlines()


def test_the_least_rank_is_compared_with_the_largest():
    behind = printed(r1=[2.5, 2.7], r8=[2.4, 2.5])
    assert behind == [
        "  r = 1   2.6000 ± 0.1414   (10)",
        "  r = 8   2.4500 ± 0.0707   (80)",
        "  r = 1 is 0.1500 behind r = 8 (seed by seed: 0.1000, 0.2000)",
    ]
    assert (
        printed(r1=[2.5, 2.25], r8=[2.625, 2.5])[-1]
        == "  r = 1 is 0.1875 ahead of r = 8 (seed by seed: 0.1250, 0.2500)"
    )


def test_one_rank_is_compared_with_none():
    assert printed(r4=[2.5]) == ["  r = 4   2.5000   (40)"]
