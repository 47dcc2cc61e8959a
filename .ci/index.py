"""Writes dist/simple, a package index (PEP 503) over the wheels in dist/: `make index`.

pip install shiva_ext --extra-index-url file://$PWD/dist/simple     # or the folder's address on a web server
"""

import hashlib
import html
import shutil
from pathlib import Path

DIST = Path(__file__).parents[1] / "dist"
PAGE = "<!DOCTYPE html>\n<html>\n<body>\n{links}\n</body>\n</html>\n"


def write_index(dist: Path) -> list[str]:
    """Index the wheels and sdists of a folder; returns their names."""
    files = sorted([*dist.glob("*.whl"), *dist.glob("*.tar.gz")])
    simple = dist / "simple"
    shutil.rmtree(simple, ignore_errors=True)
    project = simple / "shiva-ext"
    project.mkdir(parents=True)
    links = []
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        name = html.escape(file.name)
        address = f"../../{name.replace('+', '%2B')}#sha256={digest}"
        links.append(f'<a href="{address}" data-requires-python="&gt;=3.10">{name}</a><br>')
    (project / "index.html").write_text(PAGE.format(links="\n".join(links)))
    (simple / "index.html").write_text(PAGE.format(links='<a href="shiva-ext/">shiva-ext</a>'))
    return [file.name for file in files]


if __name__ == "__main__":
    names = write_index(DIST)
    print(f"{DIST / 'simple'}: {', '.join(names) or 'no wheel yet: run `make wheels`'}")
