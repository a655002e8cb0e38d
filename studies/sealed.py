"""JSON files with a digest of what they hold: a file that was changed, cut or swapped is refused, not read.

A sealed file is one JSON object, ``{"sha256": ..., "content": ...}``. The digest is of the content, number for number in the
order it has there, and of the file's name with that of its folder: the file of another run does not pass for this one's.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from secondorder.atomic import read_regular
from secondorder.errors import InputError
from studies.results import write_file

RECOMPUTE = "delete it, and the same command computes it again"
"""What to do with a file that cannot be used."""


def write_sealed(file: Path, content: Any) -> None:
    """Write content that JSON can hold, with its digest; InputError that names the file when it cannot be written."""
    text = json.dumps(content)
    write_file(file, f'{{"sha256": "{_digest(file, text)}", "content": {text}}}\n')


def read_sealed(file: Path, way_out: str = RECOMPUTE) -> Any:
    """The content of a file that `write_sealed` wrote.

    InputError, which names the file and ends with `way_out`, when it is missing, unreadable or no file, when it is not JSON or
    has no digest (it was written before there were digests), and when digest and content do not belong together.
    """
    try:
        sealed = json.loads(read_regular(file).decode())
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}); {way_out}") from None
    if not isinstance(sealed, dict) or sealed.keys() != {"sha256", "content"}:
        raise InputError(f"{file} has no digest: it is damaged, or an earlier version wrote it; {way_out}")
    if sealed["sha256"] != _digest(file, json.dumps(sealed["content"])):
        raise InputError(f"{file} is damaged: it is not what was written there; {way_out}")
    return sealed["content"]


def _digest(file: Path, text: str) -> str:
    return hashlib.sha256(f"{file.absolute().parent.name}/{file.name}\n{text}".encode()).hexdigest()
