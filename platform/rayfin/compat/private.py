"""Private names of other packages: what each is for, and whether it is where rayfin expects it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module, metadata
from typing import Any

from rayfin.errors import DependencyError


@dataclass(frozen=True)
class PrivateName:
    """A module, class, function or attribute that its package may move in any release."""

    user: str
    """The module of `rayfin.compat` that uses it."""
    module: str
    """The module that has it."""
    name: str
    """Its name there, with dots between a class and its attribute."""
    needed_to: str
    """What rayfin needs it for: the end of a sentence that begins with "rayfin needs it to"."""
    instead: str
    """The public interface with which rayfin could do without it."""
    parameters: tuple[str, ...] | None = None
    """The names of all its parameters but `self`, as rayfin calls or overrides it."""
    keywords: tuple[str, ...] = ()
    """Parameters by name, of one that has more than rayfin uses."""
    on_instances: bool = False
    """Whether it is assigned to objects, by methods of its class or anywhere in the module."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def package(self) -> str:
        """The name of the top-level package."""
        return self.module.partition(".")[0]

    def get(self) -> Any:
        """Return what has this name; raise DependencyError where nothing has it."""
        return self._at(self.name.split("."))

    def of(self, instance: Any) -> Any:
        """Return this attribute of `instance`; raise DependencyError where it has none."""
        try:
            return getattr(instance, self.name.rpartition(".")[2])
        except AttributeError as error:
            raise self.moved("has no") from error

    @contextmanager
    def replaced(self, value: Any) -> Iterator[None]:
        """Put `value` in its place within the block, for all threads of the process.

        Raise DependencyError where nothing has this name.
        """
        before = self.replace(value)
        try:
            yield
        finally:
            self.replace(before)

    def replace(self, value: Any) -> Any:
        """Put `value` in its place and return what was there.

        Raise DependencyError where nothing has this name.
        """
        *path, last = self.name.split(".")
        before = self.get()
        setattr(self._at(path), last, value)
        return before

    def check(self) -> None:
        """Raise DependencyError unless it is there with the parameters that rayfin gives it."""
        if self.on_instances:
            self._check_assigned()
            return
        found = self.get()
        if self.parameters is None and not self.keywords:
            return
        every = [*inspect.signature(found).parameters]
        names = tuple(every[1:] if every[:1] == ["self"] else every)
        if self.parameters not in (None, names):
            raise self.moved(f"has other parameters ({', '.join(names) or 'none'}) for")
        if missing := [name for name in self.keywords if name not in names]:
            raise self.moved(f"has no parameter {missing[0]} for")

    def moved(self, how: str) -> DependencyError:
        """Return the error that says what the installed version does otherwise (`has no`, ...)."""
        distribution = _DISTRIBUTIONS.get(self.package, self.package)
        try:
            installed = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            installed = "(not installed)"
        file = self.user.removeprefix("rayfin.").replace(".", "/")
        return DependencyError(
            f"{distribution} {installed} {how} {self}, which rayfin needs to {self.needed_to} "
            f"(see rayfin/{file}.py); run: pip install '{tested(distribution)}'"
        )

    def _at(self, path: list[str]) -> Any:
        try:
            module = import_module(self.module)
        except ImportError as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and f"{self.module}.".startswith(f"{missing}."):
                raise self.moved("has no") from error
            reason = " ".join(str(error).split())
            raise self.moved(f"can't be imported ({reason}) for") from error
        try:
            return reduce(getattr, path, module)
        except AttributeError as error:
            raise self.moved("has no") from error

    def _check_assigned(self) -> None:
        *path, attribute = self.name.split(".")
        owner = self._at(path)
        bases = inspect.getmro(owner) if inspect.isclass(owner) else [owner]
        sources = [base for base in bases if getattr(base, "__module__", "") != "builtins"]
        assigned = re.compile(rf"\b\w+\.{attribute}(?:\s*:[^=\n]+)?\s*=(?!=)")
        if not any(assigned.search(inspect.getsource(source)) for source in sources):
            raise self.moved("has no")


_DISTRIBUTIONS = {"huggingface_hub": "huggingface-hub"}
"""Packages whose distribution has another name."""


def tested(distribution: str) -> str:
    """Return the requirement on a distribution with the minor version that rayfin was tested with.

    That is the last one before the upper bound of rayfin's own requirement.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("rayfin") or []
    except metadata.PackageNotFoundError:  # it runs from its source
        lines = []
    for requirement in map(Requirement, lines):
        if requirement.name.lower() == distribution:
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            for bound in requirement.specifier:
                major, dot, minor = bound.version.partition(".")
                if bound.operator == "<" and dot:
                    return f"{distribution}{extras}=={major}.{int(minor) - 1}.*"
            return f"{distribution}{extras}{requirement.specifier}"
    return distribution
