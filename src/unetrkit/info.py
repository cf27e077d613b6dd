"""What `unetrkit info` tells without importing torch: the recipes and the environment."""

import os
import platform
from importlib import metadata

from unetrkit.errors import UserError, nearest

TOPICS = ("recipes", "environment", "networks", "weights")
REPORTED = ("unetrkit", "torch", "numpy", "scipy", "nibabel", "blosc2", "SimpleITK", "pydicom")


def environment() -> dict[str, str]:
    """Versions, platform and cores: what a report or a bug report has to name."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["cores"] = str(os.cpu_count())
    for package in REPORTED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(what: str) -> dict[str, str]:
    """Rows of `unetrkit info WHAT`.

    >>> describe("environmnt")
    Traceback (most recent call last):
        ...
    unetrkit.errors.UserError: `environmnt` is nothing that info knows
    """
    from unetrkit.config import recipes

    tables = {"recipes": lambda: dict(recipes()), "environment": environment}
    if what not in tables:
        raise UserError(f"`{what}` is nothing that info knows", hint=nearest(what, TOPICS))
    return tables[what]()
