"""Downloads of published files: what is there already is used, and what broke off goes on."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from llmc.errors import RunError

CHUNK_BYTES = 1 << 16
TIMEOUT = 60  # seconds without a byte


def download(url: str, path: Path, instead: str) -> Path:
    """`path`, from `url` unless it is there; until it is complete it is called .NAME.part, from which a rerun goes on.

    RunError if that fails; `instead` is the command that takes a copy of the file.
    """
    if path.exists():
        return path
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # it sends all of it
            length = response.headers["Content-Length"]
            total = None if length is None else have + int(length)
            with (
                open(part, "ab" if have else "wb") as file,
                tqdm(desc=path.name, initial=have, total=total, unit="B", unit_scale=True, disable=None) as progress,
            ):
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    progress.update(len(chunk))
        if total is not None and (missing := total - part.stat().st_size):
            raise RunError(
                f"{url}: the connection ended {missing} bytes before the end: the same command goes on there"
            )
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:  # urllib's are OSError
        if isinstance(error, urllib.error.HTTPError) and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
            return download(url, path, instead)
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise RunError(f"cannot download {url} ({reason}); get the file in another way and run: {instead}") from error
    return path
