"""The application for Ray Serve's own commands, from the root of the repository.

serve run serve/local.yaml
serve run serve.app:app model.name=tiny deployment.replicas=2
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.serve import Application

from rayfin.serving import deployment

_ROOT = Path(__file__).resolve().parents[1]


def app(args: Mapping[str, Any]) -> Application:
    """`args` as `rayfin serve` reads them; relative paths are from the root of the repository."""
    return deployment.app(args, _ROOT)
