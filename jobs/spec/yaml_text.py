"""Reading YAML that a person wrote: a mistake is one sentence with its place, and never a traceback."""

from typing import Any

import yaml


class NotYaml(ValueError):
    """A text that is no YAML, in one sentence."""


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises NotYaml."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise NotYaml(_explain_yaml(error)) from None
    except RecursionError:
        raise NotYaml("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML where a key that is written twice is a mistake; by default the last one wins and the other is lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:number]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """YAML reads 2024-13-01 as a day, and -0x_ as a number: Python then says what it thinks of that."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r} is no {kind} ({error}); put it in quotes if it is text", node.start_mark
            ) from None


def _explain_yaml(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    begun = f" ({error.context} at {_place(error.context_mark)})" if error.context and error.context_mark else ""
    return f"{_place(error.problem_mark)}: {error.problem}{begun}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
