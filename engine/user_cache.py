"""Where this user's measurements and compiled kernels are kept between runs."""

import os
from pathlib import Path

CACHE_VARIABLE = "NANOSERVE_CACHE_DIR"


def cache_directory() -> Path:
    """$NANOSERVE_CACHE_DIR, or what the operating system provides for it."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser()
    from platformdirs import user_cache_dir  # a machine that only measures may lack it

    return Path(user_cache_dir("nanoserve"))
