"""Chat templates of Llama's descendants, as their models are prompted.

Each has the style of Jinja that is common in its family: operators, whitespace control,
namespaces, macros, slices and exceptions.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """A template, and the special tokens that it writes.

    Attributes:
      template: its Jinja.
      special: special tokens beyond the pieces of Llama 2.
      eos: the token that ends a sequence.
    """

    template: str
    special: tuple[str, ...] = ()
    eos: str = "</s>"


_CHATML = ("<|im_start|>", "<|im_end|>")
_HEADERS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

FAMILIES = {
    "zephyr": Family(
        """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
    ),
    "chatml": Family(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + "
        "message.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        _CHATML,
        "<|im_end|>",
    ),
    "smollm2": Family(
        """\
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}
    {%- endif -%}
    {{ '<|im_start|>' ~ message['role'] ~ '\\n' }}
    {{- message['content'] ~ '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}""",
        _CHATML,
        "<|im_end|>",
    ),
    "llama2-chat": Family(
        """\
{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
{% set rest = messages %}
{% set system = false %}
{% endif %}
{%- for message in rest -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if loop.index0 == 0 and system is not false -%}
{%- set content = system + message['content'] -%}
{%- else -%}
{%- set content = message['content'] -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + content.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}"""
    ),
    "llama3": Family(
        """\
{{- bos_token }}
{%- if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date + '\\n\\n' }}
{{- system_message }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {{- raise_exception('This model only supports single tool-calls at once!') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
        (*_HEADERS, "<|eom_id|>"),
        "<|eot_id|>",
    ),
    "vicuna": Family(
        """\
{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}\
{% set messages = messages[1:] %}\
{% else %}{{ 'A chat between a curious user and an assistant. ' }}{% endif %}
{% for message in messages %}
{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}\
{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
    ),
    "orca2": Family(
        """\
{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
        _CHATML,
    ),
    "mistral": Family(
        """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message.role == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After a system message, roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message.content + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message.content + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message.content|trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
        ("[INST]", "[/INST]"),
    ),
    "alpaca": Family(
        """\
{% macro part(title, text) %}### {{ title }}:
{{ text }}

{% endmacro %}
{{ (messages|selectattr('role', 'equalto', 'system')|map(attribute='content')|first
    or 'Below is an instruction. Write a response.') ~ '\\n\\n' }}
{%- for message in messages if message.role != 'system' -%}
{{ part('Instruction', message.content) if message.role == 'user'
   else '### Response:\\n' ~ message.content ~ eos_token ~ '\\n\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
    ),
    "deepseek": Family(
        "{% if not add_generation_prompt is defined %}"
        "{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ 'User: ' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ 'Assistant: ' + message['content'] + eos_token }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        ("<｜end▁of▁sentence｜>",),
        "<｜end▁of▁sentence｜>",
    ),
    "marked": Family(
        """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}\
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
        _CHATML,
        "<|im_end|>",
    ),
}
