"""Options from a YAML or TOML file."""

import sys
from pathlib import Path
from typing import Any

from rwkv_es.config.options import PROVENANCE
from rwkv_es.errors import ConfigError


def load_file(path: str) -> dict[str, Any]:
    """Read options from a YAML or TOML file (by its ending); a run folder's config.yaml is one of them.

    Raises:
        ConfigError: unreadable, not a mapping, or not parseable.
    """
    parse = _PARSERS.get(Path(path).suffix)
    if parse is None:
        raise ConfigError(f"a config file must end in {', '.join(_PARSERS)}; got {path!r}")
    text = _read_text(path)
    try:
        values = parse(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of options to values; got {type(values).__name__}")
    return {name: value for name, value in values.items() if name != PROVENANCE}


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return {} if (values := yaml.safe_load(text)) is None else values
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


_PARSERS = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".toml": _parse_toml}
