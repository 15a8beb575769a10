"""The chat template that travels with a checkpoint."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemojax.errors import InputError
from nemojax.layout import ADDITIONAL_TEMPLATES


def tokenizer_config(path: str | os.PathLike) -> dict[str, Any]:
    """`tokenizer_config.json` of a checkpoint directory; empty if there is none.

    Raises:
      InputError: it is damaged.
    """
    file = Path(path) / "tokenizer_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}); download it again") from None


def special_token(settings: dict[str, Any], name: str) -> str | None:
    """Text of `bos_token`, `eos_token`, ..., which may be given as a text or as an object."""
    token = settings.get(name)
    return token.get("content") if isinstance(token, dict) else token


def chat_template(path: str | os.PathLike, name: str | None = None) -> str:
    """The source of the template called `name`, by default `default`.

    As in transformers, `chat_template.jinja` is the default and `additional_chat_templates` holds others by their name;
    where there is none of these files, `tokenizer_config.json` has one template, or several with their names.

    Raises:
      InputError: the checkpoint has none, or none of that name, or they are damaged.
    """
    found = {name: text for name, text in _templates(Path(path)).items() if text}
    if not found:
        raise InputError(f"{path}: the checkpoint has no chat template; run without it, or add chat_template.jinja")
    if (name := name or "default") not in found:
        raise InputError(f"{path}: no chat template {name!r}; there are {', '.join(sorted(found))}")
    return found[name]


def _templates(path: Path) -> dict[str, str]:
    files = {file.stem: file for file in (path / ADDITIONAL_TEMPLATES).glob("*.jinja")}
    if (file := path / "chat_template.jinja").is_file():
        files["default"] = file
    if files:
        return {name: _text(file) for name, file in files.items()}
    template = tokenizer_config(path).get("chat_template") or []
    if isinstance(template, str):
        return {"default": template}
    try:
        return {entry["name"]: entry["template"] for entry in template}
    except (KeyError, TypeError):
        raise InputError(f"{path}/tokenizer_config.json: chat_template is no list of names and templates") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error}); download it again") from None


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; its text is part of the conversation like any other."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def render(
    template: str, messages: list[dict[str, Any]], settings: dict[str, Any], *, add_generation_prompt: bool
) -> str:
    """The text of a conversation. Without `add_generation_prompt`, it ends inside the last message, to be continued.

    A template finds what transformers gives it: the same names, functions and filters.

    Args:
      template: source of the template. messages: dicts with `role` and `content`.
      settings: the checkpoint's `tokenizer_config.json`, whose special tokens a template may use.

    Raises:
      InputError: the template is broken or refuses the conversation.
    """

    def refuse(message: str):
        raise TemplateError(message)

    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    # Not Jinja's own, which escapes what HTML would not take.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    tokens = {name: special_token(settings, name) for name in settings if name.endswith("_token")}
    try:
        text = environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"chat template: {error}; check the roles of the conversation") from None
    if add_generation_prompt:
        return text
    last = messages[-1]["content"].strip()
    at = text.rfind(last)
    if at < 0:
        raise InputError("chat template: it changes the last message, so that it cannot be continued")
    return text[: at + len(last)]
