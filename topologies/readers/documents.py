"""XML, JSON and YAML text to objects, with the harmful forms refused before they cost anything.

An entity or an alias can make ten lines of text expand to gigabytes, and brackets that nest deeply
enough exhaust the stack. No topology needs any of that.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import yaml

from epplan.errors import InputError

Element = ElementTree.Element

MAX_DEPTH = 100
MAX_XML_CHARACTERS = 16 * 2**20  # a large machine's hwloc file has less than one
MAX_NUMA_NODES = 1024  # of one file: each is joined to all others
MAX_YAML_CHARACTERS = 4 * 2**20  # YAML is slow to read; JSON and plain text may be larger
MAX_YAML_NODES = 1_000_000  # with every alias written out
_HWLOC_DOCTYPE = re.compile(r'<!DOCTYPE\s+topology\s+SYSTEM\s+"hwloc2?\.dtd"\s*>')
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster


def parse_xml(text: str, what: str) -> Element:
    """Return the root element.

    Raises:
        InputError: not well-formed, nested too deeply, or with a DOCTYPE other than hwloc's.
    """
    if "<!ENTITY" in text or len(re.findall("<!DOCTYPE", text)) > len(_HWLOC_DOCTYPE.findall(text)):
        raise InputError(f"{what} declares a DOCTYPE or entities; no topology needs them")
    if len(text) > MAX_XML_CHARACTERS:
        raise InputError(
            f"{what} has {len(text)} characters; XML is read up to {MAX_XML_CHARACTERS}"
        )
    try:
        root = ElementTree.fromstring(text.strip())  # some cloud files begin with a blank line
    except ElementTree.ParseError as error:
        line, column = error.position
        raise InputError(
            f"{what} is not well-formed XML: line {line}, column {column}: {error.msg}"
        ) from None
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [child for element in level for child in element]
    if level:
        raise InputError(f"{what} is nested deeper than {MAX_DEPTH} elements")
    return root


def whole_number(element: Element, name: str, default: int, what: str) -> int:
    """Return an attribute as a number not below zero (-1 stands for unknown).

    Raises:
        InputError: it is anything else.
    """
    text = (element.get(name) or "").strip()
    if not text:
        return default
    if text == "-1":
        return -1
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    if re.fullmatch("0[xX][0-9a-fA-F]{1,8}", text):
        return int(text, 16)
    raise InputError(f"{what}: <{element.tag}> has {name}={text!r}, which is no whole number")


def parse_document(text: str, what: str) -> Any:
    """Return a JSON or YAML document as dicts, lists and plain values.

    Raises:
        InputError: with the line of the first mistake; or what it does is refused.
    """
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except RecursionError:
            raise InputError(f"{what} is nested deeper than {MAX_DEPTH} levels") from None
        except ValueError:
            pass  # YAML in brackets, or a mistake that YAML names by line
    if len(text) > MAX_YAML_CHARACTERS:
        raise InputError(
            f"{what} has {len(text)} characters; YAML is read up to {MAX_YAML_CHARACTERS}",
            hints=["save it as JSON, which is read up to 64 MiB"],
        )
    try:
        _check_events(text, what)
        return _construct(text, what)
    except RecursionError:  # aliases may nest what each nests little
        raise InputError(f"{what} is nested deeper than {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # libyaml names the line after the last one when the text just ends
        where = f" at line {min(mark.line, text.rstrip().count(chr(10))) + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{what} is not valid YAML{where}: {problem}") from None


def _check_events(text: str, what: str) -> None:
    """Refuse tags and deep nesting: the composer would recurse through them."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        if getattr(event, "tag", None) is not None:
            line = event.start_mark.line + 1
            raise InputError(
                f"{what} has the YAML tag {event.tag} at line {line}; write it plainly"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise InputError(f"{what} is nested deeper than {MAX_DEPTH} levels")


def _construct(text: str, what: str) -> Any:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}, what) > MAX_YAML_NODES:
            raise InputError(f"{what}: its YAML aliases expand to over {MAX_YAML_NODES} values")
        return loader.construct_document(root)
    except ValueError as error:  # 0x_ and 2001-99-99 look like a number and a date
        raise InputError(f"{what} is not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int], what: str) -> int:
    """Return the number of values under a node with every alias written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise InputError(f"{what}: a YAML alias contains itself")
        return known[id(node)]
    known[id(node)] = 0  # until it is complete
    size = 1
    if isinstance(node, yaml.MappingNode):
        size += sum(_size(part, known, what) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_size(part, known, what) for part in node.value)
    known[id(node)] = size
    return size
