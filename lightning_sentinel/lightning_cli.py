"""LightningCLI that reports mistakes in this package's settings as plainly as a script does, and hides internals in the help.

Apart from :mod:`lightning_sentinel.cli`, because ``jsonargparse`` is an extra.
"""

from __future__ import annotations

import re
import sys
from argparse import Action
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter, Namespace
from jsonargparse.util import import_object
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import ConfigurationError, SentinelError
from lightning_sentinel.wrong_settings import in_our_words

__all__ = ["SentinelCLI"]

_OURS = "lightning_sentinel."
_INTERNAL = re.compile(rf",? ?{re.escape(_OURS)}(?:strategy|pipeline)\.[\w.]+(?=[,)])")
_GROUPS = {"verification": Verification, "response": Response}


class SentinelCLI(LightningCLI):
    """LightningCLI for this package."""

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(formatter_class=_Help, **kwargs)
        parser.error = _fail
        return parser

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except SentinelError:
            raise
        except ValueError:
            # jsonargparse puts a class's message among all types that it tried, and the whole configuration behind it.
            for node in _nodes(self.config):
                _make(node)
            _require_known_strategy(self.config)
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
    """Make an object as a script would, so that it raises its own error."""
    arguments = dict(vars(node.get("init_args", Namespace())))
    for name, group in _GROUPS.items():
        if isinstance(arguments.get(name), Namespace):
            arguments[name] = group(**vars(arguments[name]))
    try:
        import_object(node["class_path"])(**arguments)
    except SentinelError:
        raise
    except Exception:
        return  # an error of another kind, which only the whole configuration explains


def _fail(message: str, ex: Exception | None = None) -> NoReturn:
    """Replace a parser's ``error``: report neither all options, which are in the help, nor all types that were tried."""
    if (plain := in_our_words(message)) is not None:
        raise ConfigurationError(plain) from None
    print(f"error: {message}\nFor the options: lightning-sentinel fit --help", file=sys.stderr)
    raise SystemExit(2) from ex


def _require_known_strategy(config: Namespace) -> None:
    """Raise ``ConfigurationError`` if the Trainer's strategy is given by an unknown name."""
    for trainer in (value for name, value in config.items() if name.split(".")[-1] == "strategy"):
        if isinstance(trainer, str) and trainer != "auto" and trainer not in (known := StrategyRegistry.available_strategies()):
            near = get_close_matches(trainer, known, 1)
            names = ", ".join(name for name in known if name.startswith("sentinel"))
            raise ConfigurationError(
                f"There is no strategy {trainer!r}.{f' Did you mean {near[0]!r}?' if near else ''} This package's are {names}."
            ) from None


class _Help(DefaultHelpFormatter):  # type: ignore[misc]
    """Lists classes that a user may choose, and no subclasses of Lightning's that are for this package's own use."""

    def _expand_help(self, action: Action) -> str:
        return _INTERNAL.sub("", super()._expand_help(action))
