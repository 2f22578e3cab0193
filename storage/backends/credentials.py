"""The credentials file of AWS's tools, which obstore does not read by itself.

The keys of the environment, a web identity's token file, and the roles of containers and machines are obstore's own
business: it renews what these give before it expires. A file is read again every minute, so a tool that keeps it fresh
keeps a long run going.
"""

import configparser
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from storage.errors import StorageError

READ_AGAIN = timedelta(minutes=1)
COME_FIRST = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
"""Where the environment has one of these, AWS's tools do not look into the file either."""


def shared_file_credentials() -> Callable[[], dict[str, Any]] | None:
    """What gives the keys of the profile AWS_PROFILE; None where they come from elsewhere. Raises StorageError when
    AWS_PROFILE names a profile that has no keys."""
    if any(name in os.environ for name in COME_FIRST):
        return None
    named = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    profile = named or "default"

    def read() -> dict[str, Any]:
        file = configparser.ConfigParser(interpolation=None)
        try:
            file.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            raise StorageError(f"the credentials file {path} cannot be read") from None  # its lines are secrets
        keys = dict(file[profile]) if file.has_section(profile) else {}
        if not {"aws_access_key_id", "aws_secret_access_key"} <= keys.keys():
            raise StorageError(
                f"the profile {profile!r} has no keys in {path}: where it signs in another way (SSO, a role), put its "
                "keys into the environment with: aws configure export-credentials --format env"
            )
        return {
            "access_key_id": keys["aws_access_key_id"],
            "secret_access_key": keys["aws_secret_access_key"],
            "token": keys.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + READ_AGAIN,
        }

    try:
        read()
    except StorageError:
        if named:
            raise
        return None  # nobody asked for it: the machine may have a role
    return read
