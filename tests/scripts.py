"""The scripts beside the package, docs/*.py and notebooks/*.py, as modules."""

import importlib.util


def loaded(path):
    """The module that a Python file is, run anew."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
