"""The packages that serving needs, an extra."""

from __future__ import annotations

from truthgpt.errors import ConfigError


def require_server_packages() -> None:
    """Raise ConfigError when starlette or uvicorn cannot be imported."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"serving needs the packages starlette and uvicorn: {error} (pip install 'truthgpt[demo]')"
        ) from error
