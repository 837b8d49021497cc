"""JSON and YAML, read as data: a file gives a tree of plain values that is no larger than the file and can be printed
and written again, or else an error of one line.
"""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UserError


def read_json(path: Path) -> Any:
    """What a JSON file holds. OSError where it cannot be read, and ValueError, in a line, where it is no JSON."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """As json.loads. ValueError also where lists are nested too deep, or a text holds half a character, which cannot be
    written again."""
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():  # perhaps half a character
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("its lists are nested too deep") from None
    return content


class _Loader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing; here they are a mistake. So is a value that YAML fails to
    make, such as a date that does not exist."""

    def construct_mapping(self, node, deep=False):
        key_nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen = set()
        for key_node in key_nodes:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # else YAML's own refusal follows
                if key in seen:
                    raise yaml.MarkedYAMLError(problem=f"'{key}' stands here twice", problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            problem = f"this is no {node.tag.rpartition(':')[2]:.20}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from e

    def get_single_node(self):
        """The document's nodes. MarkedYAMLError where aliases, &name and *name, make far more of them than the file has
        characters, and for half a character or a number of more than 100 digits."""
        node = super().get_single_node()
        left, waiting = 1000 + len(self.buffer), [node] if node else []
        while waiting:
            found = waiting.pop()
            left -= 1
            problem = None if left > 0 else "its aliases unfold to far more than the file"
            if isinstance(found, yaml.MappingNode):
                waiting += [x for item in found.value for x in item]
            elif isinstance(found, yaml.SequenceNode):
                waiting += found.value
            else:
                left -= len(found.value)
                if re.search("[\ud800-\udfff]", found.value):
                    problem = "half a character"
                if found.tag == "tag:yaml.org,2002:int" and len(found.value) > 400:  # more than any float has
                    problem = f"a number of {len(found.value)} digits"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=found.start_mark)
        return node


def read_yaml(path: Path, what: str, by: str = "") -> Any:
    """What a YAML file holds, None if it is empty. UserError, naming file and line, where it cannot be read, says a
    thing twice, or would unfold to far more than it is. `what` is the kind of file, and `by` who named it, in front of
    the message."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{by}no {what} file {path}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read the {what} {path}: {getattr(e, 'strerror', None) or e}") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML: {getattr(e, 'problem', None) or ' '.join(str(e).split())}"
        ) from e
