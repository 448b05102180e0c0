"""A dataset that every environment has: the Python sources of its installed packages, as plain text.

    python train_ds.py --dataset benchmarks/installed_python.py

At most `MOST_BYTES` of them, in an order that depends on their paths alone. Which packages there are differs from
one environment to the other, so losses are to be compared within one.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 130_000_000
LONGEST = 200_000  # longer files are tables more than programs


def examples() -> Iterator[dict[str, str]]:
    """Rows of `text` and `template`, the path of the file below the packages."""
    packages = Path(sysconfig.get_path("purelib"))
    paths = [path.relative_to(packages).as_posix() for path in packages.rglob("*.py")]
    left = MOST_BYTES
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest()):
        try:
            text = (packages / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and len(text) <= LONGEST:
            left -= len(text.encode())
            if left < 0:
                return
            yield {"text": text, "template": path}
