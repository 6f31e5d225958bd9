"""The lowest versions that pyproject.toml names, as requirements: `pip install -r <(python .ci/floors.py dev)`."""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *(r for extra in sys.argv[1:] for r in project["optional-dependencies"][extra])]
for requirement in wanted:
    name, floor = re.fullmatch(r"([\w-]+)(?:>=|==)([\w.]+)", requirement).groups()
    print(f"{name}=={floor}")
