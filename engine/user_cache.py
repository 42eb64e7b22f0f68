"""Where this user's measurements and compiled kernels are kept between runs."""

import os
from pathlib import Path

from platformdirs import user_cache_dir

CACHE_VARIABLE = "NANOSERVE_CACHE_DIR"


def cache_directory() -> Path:
    """$NANOSERVE_CACHE_DIR, or what the operating system provides for it."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("nanoserve")).expanduser()
