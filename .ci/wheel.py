"""What a built wheel and source distribution hold: `python .ci/wheel.py FOLDER`, from the repository's root."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

(wheel,), (source,) = (list(Path(sys.argv[1]).glob(end)) for end in ("*.whl", "*.tar.gz"))
version = re.search(r'^__version__ = "(.*)"$', Path("tinylora/__init__.py").read_text(encoding="utf-8"), re.M)[1]
assert wheel.name == f"tinylora-{version}-py3-none-any.whl" and source.name == f"tinylora-{version}.tar.gz"

package = {str(path) for path in Path("tinylora").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
about = f"tinylora-{version}.dist-info"
with zipfile.ZipFile(wheel) as file:
    held = {name for name in file.namelist() if not name.startswith(f"{about}/")}
    wrong = held ^ package - {"tinylora/data/make_texts.py"}
    assert not wrong, f"only in the wheel or only in the folder tinylora: {sorted(wrong)}"
    different = [name for name in held if file.read(name) != Path(name).read_bytes()]
    assert not different, f"other bytes in the wheel than in the folder tinylora: {different}"
    assert file.read(f"{about}/licenses/LICENSE") == Path("LICENSE").read_bytes()
    metadata = email.message_from_bytes(file.read(f"{about}/METADATA"))
said = [
    metadata[name] for name in ("Name", "Version", "License-Expression", "License-File", "Description-Content-Type")
]
assert said == ["tinylora", version, "MIT", "LICENSE", "text/markdown"], said
assert metadata.get_payload(decode=True).decode() == Path("README.md").read_text(encoding="utf-8")

with tarfile.open(source) as file:
    held = {name.partition("/")[2] for name in file.getnames()} - {"PKG-INFO"}
if shutil.which("git") and Path(".git").exists():

    def listed(*which):
        return set(subprocess.check_output(["git", "ls-files", *which], text=True).splitlines())

    kept = listed("-c") - listed("-d")
    assert kept <= held, f"not in the source distribution: {sorted(kept - held)}"
    more = held - kept - listed("-o", "--exclude-standard")
    assert not more, f"in the source distribution, although the repository ignores it: {sorted(more)}"
