"""Reads the chat template of a model folder."""

from collections.abc import Container
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.control_tokens import END_OF_TURN, START_OF_TURN
from rgexport.griffin.tokenizer_files import TOKENIZER_CONFIG
from rgexport.progress import warn

JINJA_FILE = "chat_template.jinja"
"""Takes precedence over the template in tokenizer_config.json."""
BUILT_IN = "built-in"
"""The origin of a template that no file has."""
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
    """Returns the template in chat_template.jinja or tokenizer_config.json, and the file's name.

    Raises:
        RequestError: a file that cannot be read, or several named templates and no default.
    """
    try:
        jinja, config = folder / JINJA_FILE, folder / TOKENIZER_CONFIG
        if jinja.is_file():
            return read_regular(jinja).decode(), jinja.name
        if not config.is_file():
            return None
        template = parse_json(read_regular(config)).get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            if "default" not in named:
                raise RequestError(
                    f"{config} has the chat templates {', '.join(named)}; expected one named "
                    "default"
                )
            template = named["default"]
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template is a {type(template).__name__}; expected text")
        return (template, config.name) if template else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"the chat template in {folder} cannot be read ({type(error).__name__}: {error}); "
            "copy chat_template.jinja or tokenizer_config.json again"
        ) from None


def chat_template(folder: Path) -> tuple[str, str]:
    """Returns the folder's chat template, or Gemma's where it has none."""
    return read_chat_template(folder) or (GEMMA_TEMPLATE, BUILT_IN)


def chosen_template(folder: Path, special: Container[str], name: str) -> str | None:
    """Returns the template of an artifact's chats; None if it has none.

    Warns if such a chat would be refused. `special` are the literals of the tokenizer's control
    tokens and markup, `name` is the model's.
    """
    source, origin = chat_template(folder)
    missing = missing_turns(source, special)
    if not missing:
        return source
    warn(
        f"{name} cannot chat: its tokenizer has no {' and no '.join(missing)}, which the chat "
        f"template ({origin}) needs"
    )
    return None if origin == BUILT_IN else source


def missing_turns(template: str, special: Container[str]) -> list[str]:
    """Returns the turn tokens that a template writes but a vocabulary lacks."""
    turns = (START_OF_TURN, END_OF_TURN)
    return [turn for turn in turns if turn in template and turn not in special]
