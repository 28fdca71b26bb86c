"""Files at the border: read with one clear error, write whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from epplan.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def read_text(path: Path, what: str) -> str:
    """Return the text of `path`; `what` names it in errors ("plan", "cluster file").

    Raises:
        InputError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{what} not found: {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not text: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path`, then rename it: never half a file.

    Raises:
        InputError: the folder is missing or not writable.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
            name = Path(temporary.name)
            temporary.write(data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        umask = os.umask(0)
        os.umask(umask)
        name.chmod(0o666 & ~umask)
        name.replace(path)
    except OSError as error:
        name.unlink()
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def parse_yaml(text: str, what: str) -> Any:
    """Return the YAML (or JSON, its subset) document in `text`.

    Raises:
        InputError: with the line of the first mistake.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{what} is not valid YAML{where}: {problem}") from None


def validate(model: type[Model], document: Any, what: str) -> Model:
    """Return `document` as a `model`, or every problem in it at once.

    Raises:
        InputError: one line per problem, with its path in the document.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc']) or 'the document'}: "
            f"{item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise InputError(f"{what} is not valid", problems=problems) from None
