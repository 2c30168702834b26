"""Templates for models that bring none."""

from dataclasses import dataclass
from typing import Literal

from server.text.vocabulary import Vocabulary

CHATML = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

PLAIN = """\
{% for message in messages %}
{% if message.role == "system" %}
{{ message.content }}

{% elif message.role == "assistant" %}
Assistant: {{ message.content }}
{% else %}
User: {{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
Assistant:
{%- endif %}
"""


@dataclass(frozen=True)
class DefaultTemplate:
    origin: Literal["default-chatml", "default-plain"]
    source: str
    ends: tuple[str, ...]  # texts of tokens that end an answer
    stops: tuple[str, ...]  # texts that end an answer where no token can


def default_template(vocabulary: Vocabulary) -> DefaultTemplate:
    """ChatML where both its marks are single tokens, else turns that a plain language model goes on with."""
    marks = ("<|im_start|>", "<|im_end|>")
    if all(vocabulary.find(mark) is not None for mark in marks):
        return DefaultTemplate("default-chatml", CHATML, marks[1:], ())
    return DefaultTemplate("default-plain", PLAIN, (), ("\nUser:",))
