"""The application for Ray Serve's own commands, from the root of the repository.

serve run serve/local.yaml
serve run serve.app:app model.name=tiny deployment.replicas=2
"""

from rayfin.serving.deployment import app

__all__ = ["app"]
