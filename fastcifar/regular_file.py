"""Opening files that somebody names: never a pipe, which waits for ever, nor a device, which never ends."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from fastcifar.errors import UserError, plain


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes.

    Raises:
        UserError: not there, not readable, or not a regular file (a folder, a pipe, a device).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{plain(str(path), 300)}: cannot be read: {reason}") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise UserError(f"{path}: is not a regular file")
