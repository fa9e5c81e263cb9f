"""rayfin: a Ray-based distributed experiment platform for parameter-efficient fine-tuning.

Importing it loads neither torch nor ray, nor any other part of rayfin: what is named here is loaded
when it is first used. The guide to it is docs/library.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rayfin.version import __version__ as __version__

if TYPE_CHECKING:
    from rayfin.advisor.answer import Recommendation as Recommendation
    from rayfin.advisor.estimate import Estimate as Estimate
    from rayfin.cli.scripts import script as script
    from rayfin.config import Config as Config
    from rayfin.config import ServeConfig as ServeConfig
    from rayfin.config import Space as Space
    from rayfin.config import load_config as load_config
    from rayfin.errors import RayfinError as RayfinError
    from rayfin.errors import UsageError as UsageError
    from rayfin.library.advice import estimate as estimate
    from rayfin.library.advice import recommend as recommend
    from rayfin.library.deployments import Server as Server
    from rayfin.library.deployments import serve as serve
    from rayfin.library.results import SweepResult as SweepResult
    from rayfin.library.results import TrainResult as TrainResult
    from rayfin.library.stores import open_history as open_history
    from rayfin.library.stores import open_registry as open_registry
    from rayfin.library.trials import sweep as sweep
    from rayfin.library.trials import train as train

_MODULES = {
    "Config": "rayfin.config",
    "Estimate": "rayfin.advisor.estimate",
    "RayfinError": "rayfin.errors",
    "Recommendation": "rayfin.advisor.answer",
    "ServeConfig": "rayfin.config",
    "Server": "rayfin.library.deployments",
    "Space": "rayfin.config",
    "SweepResult": "rayfin.library.results",
    "TrainResult": "rayfin.library.results",
    "UsageError": "rayfin.errors",
    "estimate": "rayfin.library.advice",
    "load_config": "rayfin.config",
    "open_history": "rayfin.library.stores",
    "open_registry": "rayfin.library.stores",
    "recommend": "rayfin.library.advice",
    "script": "rayfin.cli.scripts",
    "serve": "rayfin.library.deployments",
    "sweep": "rayfin.library.trials",
    "train": "rayfin.library.trials",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rayfin' has no attribute '{name}'")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    own = {name for name in globals() if name.startswith("_")}
    return sorted({*own, *_MODULES})
