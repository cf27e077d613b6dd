"""The YAML of recipes: plain names and values, read by YAML 1.2's core schema (https://yaml.org/spec/1.2.2/)."""

import re
from collections.abc import Hashable, Mapping

import yaml

from unetrkit.errors import UserError

DEEPEST = 16  # nested lists and mappings
EXAMPLE = "write `name: value`, one in a line, and what belongs together below `section:`"


def parse_yaml(text: str, source: str) -> dict[str, object]:
    """One YAML mapping, by YAML 1.2's core schema: no tags, no anchors, no name twice, no surprises."""
    try:
        _refuse_what_a_recipe_never_needs(text)
        values = _Loader(text).get_single_data() or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{source} is not YAML{line}: {problem}", hint=EXAMPLE) from error
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold names and values, found a {type(values).__name__}", hint=EXAMPLE)
    return values


def _refuse_what_a_recipe_never_needs(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if getattr(event, "tag", None):
            problem = "YAML tags are not allowed"
        elif getattr(event, "anchor", None):  # an alias has it too; nine of them can describe a gigabyte
            problem = "YAML anchors and aliases are not allowed"
        elif depth > DEEPEST:
            problem = f"nested deeper than {DEEPEST}"
        else:
            continue
        line = event.start_mark.line + 1 if event.start_mark else 1
        raise yaml.YAMLError(f"{problem} (line {line})")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars. PyYAML's are 1.1's: there `1e-4` is text, `off` false, `010` 8, `1:30` 90."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own class-level table, replaced

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="names must be words", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"`{key.value}` is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)

    def construct_number(self, node: yaml.ScalarNode) -> float | int:
        number = float(node.value)
        # `steps: 5e3` is what a person means by 5000
        return int(number) if "." not in node.value and number.is_integer() else number


_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
for _kind, _pattern, _first in (
    ("null", "null|~|", ["n", "~", ""]),
    ("bool", "[tT]rue|[fF]alse", list("tTfF")),
    ("int", "[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", _NUMBER, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Flat lists on one line; quotes where either version of YAML would read a string as something else."""


def _flow_list(dumper: yaml.SafeDumper, value: list) -> yaml.Node:
    flow = all(not isinstance(item, (list, dict)) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    special = bool(re.match(f"^(?:{_NUMBER})$", value))
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if special else None)


_Dumper.add_representer(list, _flow_list)
_Dumper.add_representer(str, _string)


def dump_yaml(values: Mapping[str, object]) -> str:
    """YAML that `parse_yaml` reads back to equal values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> object:
    """The value of a `key=value`.

    >>> [parse_value(text) for text in ("1e-4", "off", "true", "null", "96,96,96", "[3, 6]", "a: b", "5e3")]
    [0.0001, 'off', True, None, [96, 96, 96], [3, 6], 'a: b', 5000]
    """
    text = text.strip()
    if re.match(f"^{_NUMBER}(?:,{_NUMBER})+$", text):
        text = f"[{text}]"
    if text[:1] in {"[", "{", '"', "'"}:
        return parse_yaml(f"value: {text}", f"`{text}`")["value"]
    # anything else is one scalar as it stands: a path may hold `#`, `: ` or begin with `*`
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))
