"""A folder that is replaced as a whole, or not at all."""

import shutil
from pathlib import Path


def replace(new, out):
    """Put a folder in another's place."""
    beside = out.with_name(out.name + ".new")  # on the same disk, so that a rename suffices
    shutil.rmtree(beside, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(shutil.move(new, beside))
    if out.exists():
        old = out.with_name(out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        new.rename(out)
        shutil.rmtree(old)
    else:
        new.rename(out)
