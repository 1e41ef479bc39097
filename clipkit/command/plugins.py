"""Code and settings of the user's own, by name: modules that register losses, towers, tasks or loggers.

    clipkit-pretrain 'plugins=[my_package.losses]' loss=my_loss

or for good, by an entry point in the package's own metadata, of the group `clipkit.plugins`:

    [options.entry_points]
    clipkit.plugins =
        mine = my_package.losses

A module is imported when a job starts, before names are looked up. YAML in my_package/conf stands beside clipkit's own, group by
group. Only the command line, the user's YAML and installed packages name plugins: what a run folder says of them is never
imported. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from clipkit.command.compose import check_no_clash

GROUP, KEY = "clipkit.plugins", "plugins"
# The packages whose conf/ is searched.
_packages: list[str] = []


class _TheirSettings(SearchPathPlugin):
    """hydra asks it for more places to search."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package in _packages:
            search_path.append(f"clipkit-plugin-{package}", f"pkg://{package}.conf")


@functools.cache
def installed() -> tuple[str, ...]:
    """The modules that installed packages offer, in the order of their names."""
    return tuple(entry.value for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name))


def given(overrides: Sequence[str]) -> list[str]:
    """The modules that a command line's overrides name."""
    found: list[str] = []
    for entry in OverridesParser.create().parse_overrides(list(overrides)):
        if entry.key_or_group == KEY:
            value = entry.value()
            found = [str(name) for name in (value if isinstance(value, list) else [value])]
    return found


def search(modules: Iterable[str]) -> None:
    """Let hydra find the YAML of these modules' packages, and of those that are installed, in this process.

    Raises:
        ValueError: no such package, or a file of theirs with the name of one of clipkit's.
    """
    if _TheirSettings not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(_TheirSettings)
    # A script's folder is on the path, a console command's is not.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    for package in dict.fromkeys(name.partition(".")[0] for name in [*installed(), *modules]):
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None:
            raise ValueError(
                f"{KEY} names {package!r}, and there is no such package: install it, or start where it lies"
            )
        for folder in spec.submodule_search_locations or ():
            theirs = Path(folder) / "conf"
            check_no_clash(theirs)
            if theirs.is_dir() and package not in _packages:
                _packages.append(package)


def folders() -> list[Path]:
    """The folders of YAML of the packages that `search` has been given, in the order hydra searches them."""
    specs = [importlib.util.find_spec(package) for package in _packages]
    places = [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
    return [place / "conf" for place in places if (place / "conf").is_dir()]


def load(modules: Iterable[str]) -> None:
    """Import the modules, and those that are installed; ValueError for one that cannot be imported."""
    for name in dict.fromkeys([*installed(), *modules]):
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(
                f"the plugin {name} could not be imported: {type(error).__name__}: {error}"
            ) from error
