"""Chat templates modelled on well-known ones, written for these tests."""

CHATML = """\
{% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

# The system message goes into the first user turn, roles alternate, BOS opens turns.
INST = """\
{%- if messages[0].role == 'system' -%}
  {%- set system, rest = messages[0].content | trim, messages[1:] -%}
{%- else -%}
  {%- set system, rest = none, messages -%}
{%- endif -%}
{%- for message in rest -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{- bos_token + '[INST] ' -}}
    {%- if loop.first and system is not none -%}
      {{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}
    {%- endif -%}
    {{- message.content | trim + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message.content | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

HEADERS = """\
{{- bos_token }}
{%- macro turn(role) -%}
<|head|>{{ role }}<|/head|>{{ '\\n\\n' }}
{%- endmacro %}
{%- for message in messages %}
  {{- turn(message.role) + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- turn('assistant') }}
{%- endif %}
"""

BARS = """\
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
{% endfor %}
"""

INSTRUCTION = """\
{%- set ns = namespace(system='Below is an instruction. Write a response.') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.system = message.content -%}{%- endif -%}
{%- endfor -%}
{{ bos_token ~ ns.system ~ '\\n\\n' }}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'user' -%}
{{ '### Instruction:\\n' ~ message.content ~ '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' ~ message.content ~ eos_token ~ '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""

# Marks what the assistant writes, and drops the reasoning of earlier turns.
GENERATION = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{%- set content = message.content -%}
{%- if not loop.last and '</think>' in content -%}
{%- set content = content.split('</think>')[-1] | trim -%}
{%- endif -%}
{{- content + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Only the next role's mark ends a turn.
ROLES = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' + message.content + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""

# The block ends before the mark that ends the turn.
SHORT = GENERATION.replace(
    "{{- content + '<|im_end|>' -}}\n{%- endgeneration -%}",
    "{{- content -}}\n{%- endgeneration -%}{{- '<|im_end|>' -}}",
)

# A turn that calls a tool ends with its own mark.
CALLS = """\
{%- for message in messages -%}
{{- '<|head|>' + message.role + '<|/head|>' + message.content -}}
{{- message.tool_calls[0].function.name if message.tool_calls else '' -}}
{{- '<|eom|>' if message.tool_calls else '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|head|>assistant<|/head|>' }}{%- endif -%}
"""

ALL = {
    "chatml": CHATML,
    "inst": INST,
    "headers": HEADERS,
    "bars": BARS,
    "instruction": INSTRUCTION,
    "generation": GENERATION,
}
# What ends an assistant turn.
END = {
    "chatml": "<|im_end|>",
    "inst": "</s>",
    "headers": "<|eot|>",
    "bars": "</s>",
    "instruction": "</s>",
    "generation": "<|im_end|>",
}
