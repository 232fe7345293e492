"""Reads the chat template of a model folder."""

import json
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.files.regular_file import read_regular

# As in the tokenizer_config.json of google/recurrentgemma-2b-it.
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def read_chat_template(folder: Path) -> tuple[str, str] | None:
    """The template in chat_template.jinja or tokenizer_config.json, and the file's name.

    Raises:
        RequestError: a file that cannot be read, or several named templates and no default.
    """
    try:
        return _read(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"the chat template in {folder} cannot be read ({type(error).__name__}: {error}); "
            "copy chat_template.jinja or tokenizer_config.json again"
        ) from None


def chat_template(folder: Path) -> tuple[str, str]:
    """As `read_chat_template`, or Gemma's template where the folder has none."""
    return read_chat_template(folder) or (GEMMA_TEMPLATE, "built-in")


def _read(folder: Path) -> tuple[str, str] | None:
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.is_file():
        return read_regular(jinja).decode(), jinja.name
    if not config.is_file():
        return None
    found = json.loads(read_regular(config)).get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        if "default" not in named:
            raise RequestError(
                f"{config} has the chat templates {', '.join(named)}; expected one named default"
            )
        found = named["default"]
    if not isinstance(found, str | None):
        raise TypeError(f"chat_template is a {type(found).__name__}; expected text")
    return (found, config.name) if found else None
