"""Options from a YAML or TOML file, a recipe or a run's folder; and which folder a run has."""

import json
import os
import sys
from collections.abc import Mapping
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

from rwkv_es.config.option import default_of
from rwkv_es.config.options import FIELDS, FORMER, PROVENANCE, Config, model_name, to_dict, with_todays_names
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import expanded, read_text

RUN_CONFIG = "config.yaml"
LARGEST_BYTES = 1 << 20  # of a file of options
_DEEPEST = 16  # dots in a TOML key
LONGEST_NAME_BYTES = 120  # of a folder, before what may be added; file systems take 255
_EMBEDDED = Path(__file__).parent.parent / "tiny"
RECIPES = {
    "tiny": str(_EMBEDDED / "recipe.yaml"),
    "arithmetic": str(_EMBEDDED / "arithmetic.yaml"),
    "guess": str(_EMBEDDED / "guess.yaml"),
    "state": str(_EMBEDDED / "state.yaml"),
}


def recipe_for(given: Mapping[str, Any]) -> str:
    """Return the recipe of the embedded model for the task, if no model is given; "" if there is none."""
    tasks = {"countdown_mini": "tiny", "arithmetic_mini": "arithmetic"}
    return "" if "model" in given else tasks.get(given.get("task", "countdown_mini"), "")


def is_run_folder(path: str) -> bool:
    """Say whether a path is the folder of a training run."""
    return bool(path) and all(os.path.isfile(Path(path, name)) for name in (RUN_CONFIG, "ledger.jsonl"))


def run_folder(config: Config) -> Path:
    """Return the run's folder: `config.run`, or runs/<task>-<model> with a hash of what differs from the defaults.

    The same options find the same folder again, others never do: that of an earlier release too, which made another
    name of them.
    """
    if config.run:
        return Path(config.run)
    values = to_dict(config)
    lasting = [name for name in values if FIELDS[name].metadata["on_resume"] != "free"]
    other = {
        FIELDS[name].metadata["formerly"] or name: values[name]  # the folder's name outlives the option's
        for name in lasting
        if name not in ("task", "model") and values[name] != default_of(FIELDS[name])
    }
    tasks = [Path(part.rpartition("=")[0] or part).name.removesuffix(".py") for part in config.task.split(",")]
    stem = _short(f"{'+'.join(tasks).replace(':', '-')}-{model_name(config.model)}")
    digest = sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()[:6]
    todays = Path("runs", f"{stem}-{digest}" if other else stem)
    if is_run_folder(str(todays)):
        return todays
    earlier = (path for path in sorted(Path("runs").glob(f"{escape(stem)}*")) if is_run_folder(str(path)))
    return next((path for path in earlier if _has_options(path, {name: values[name] for name in lasting})), todays)


def _has_options(run: Path, values: Mapping[str, Any]) -> bool:
    """Say whether a run was made with some options, as far as its release knew them."""
    try:
        old = load_file(str(run))
    except ConfigError:  # somebody has spoilt it
        return False
    return all(old.get(name, default_of(FIELDS[name])) == value for name, value in values.items())


def _short(name: str) -> str:
    """Return a name that every file system takes: of a long one the beginning and a hash."""
    if len(name.encode("utf-8", "surrogatepass")) <= LONGEST_NAME_BYTES:
        return name
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name.encode('utf-8', 'replace')[:LONGEST_NAME_BYTES].decode('utf-8', 'ignore')}-{digest}"


def load_file(path: str) -> dict[str, Any]:
    """Read options from a YAML or TOML file (by its ending), a run's folder, or a recipe that is known by name.

    Raises:
        ConfigError: unreadable, not a mapping, or not parseable.
    """
    path = expanded(RECIPES.get(path, path))
    if is_run_folder(path):
        path = str(Path(path, RUN_CONFIG))
    parse = _PARSERS.get(Path(path).suffix)
    if parse is None:
        raise ConfigError(f"a config file must end in {', '.join(_PARSERS)}; got {path!r}")
    text = read_text(path, "config file", LARGEST_BYTES)
    try:
        values = parse(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be parsed: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of options to values; got {type(values).__name__}")
    values = {name: value for name, value in values.items() if name != PROVENANCE}
    file = Path(path).absolute()
    if file.name == RUN_CONFIG and is_run_folder(str(file.parent)):
        values["run"] = str(Path(path).parent)  # wherever the folder has been moved to
    else:
        for former in FORMER.keys() & values.keys():
            say_renamed(f"{former} in {path}", FORMER[former])
    return with_todays_names(values)


def say_renamed(former: str, name: str) -> None:
    """Say on stderr, once for all processes, what an option is called today."""
    if os.environ.get("RANK", "0") == "0":
        print(f"rwkv-es: note: {former} is called {name} now", file=sys.stderr)


def parse_yaml(text: str) -> Any:
    """Parse YAML as people write options: nothing is referred to elsewhere, and no key stands twice.

    Raises:
        ValueError: it is something else.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise yaml.YAMLError(f"{twice[0]} stands twice")
            return super().construct_mapping(node, deep)

    try:
        return {} if (values := yaml.load(text, Loader)) is None else values  # a safe loader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if max((line.partition("=")[0].count(".") for line in text.splitlines()), default=0) > _DEEPEST:
        raise ValueError("it is nested too deep")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


_PARSERS = {".yaml": parse_yaml, ".yml": parse_yaml, ".toml": _parse_toml}
