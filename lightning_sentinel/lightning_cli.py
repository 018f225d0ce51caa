"""LightningCLI, with mistakes in this package's settings said as plainly as from a script, and without its internals in the help.

Apart from the command, because ``jsonargparse`` is an extra.
"""

from __future__ import annotations

import re
from argparse import Action
from collections.abc import Iterator
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace
from jsonargparse.util import import_object
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import SentinelError

__all__ = ["SentinelCLI"]

_OURS = "lightning_sentinel."
_INTERNAL = re.compile(rf",? ?{re.escape(_OURS)}(?:strategy|pipeline)\.[\w.]+(?=[,)])")
_GROUPS = {"verification": Verification, "response": Response}


class SentinelCLI(LightningCLI):
    """LightningCLI for this package."""

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(formatter_class=_Help, **kwargs)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except SentinelError:
            raise
        except ValueError:
            # jsonargparse puts what a class said between all that it tried, and the whole configuration behind it.
            for node in _nodes(self.config):
                _make(node)
            raise


def _nodes(value: Any) -> Iterator[Namespace]:
    """The parts of a configuration that describe an object of this package."""
    if isinstance(value, Namespace):
        if str(value.get("class_path", "")).startswith(_OURS):
            yield value
        value = list(vars(value).values())
    if isinstance(value, list):
        for one in value:
            yield from _nodes(one)


def _make(node: Namespace) -> None:
    """Make an object as a script would. Raises what it has to say."""
    arguments = dict(vars(node.get("init_args", Namespace())))
    for name, group in _GROUPS.items():
        if isinstance(arguments.get(name), Namespace):
            arguments[name] = group(**vars(arguments[name]))
    try:
        import_object(node["class_path"])(**arguments)
    except SentinelError:
        raise
    except Exception:
        return  # of another kind, for which the configuration is needed


class _Help(DefaultHelpFormatter):  # type: ignore[misc]
    """Offers classes that a user may choose, and not those that are subclasses of Lightning's for this package's own use."""

    def _expand_help(self, action: Action) -> str:
        return _INTERNAL.sub("", super()._expand_help(action))
