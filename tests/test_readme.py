"""The README is a promise: its example runs, and prints the numbers that stand beside it."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_the_numbers_beside_it():
    source = re.search(r"```python\n(.*?)```", README, re.S)[1]
    expected = [line.split("# ", 1)[1].strip() for line in source.splitlines() if re.match(r"(tl\.)?print", line)]
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(source, "README.md", "exec"), {})
    assert out.getvalue().splitlines() == expected and len(expected) > 4


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (Path(__file__).parents[1] / target).exists(), target
