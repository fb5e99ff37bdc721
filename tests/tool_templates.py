"""Chat templates that write calls of tools as the published ones of each family do, and little else."""

from __future__ import annotations

from typing import Final

_CHATML: Final = """\
{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}CALL{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # noqa: E501

_HERMES_CALL = (
    "{{ ('\\n' if m.content or not loop.first else '') + '<tool_call>\\n{\"name\": \"' + call.function.name "
    "+ '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}"
)
_CODER_CALL = (
    "{{ '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}"
    "{% for key, value in call.function.arguments | items %}"
    "{{ '<parameter=' + key + '>\\n' + (value if value is string else value | tojson if value is mapping or "
    "value is sequence else value | string) + '\\n</parameter>\\n' }}{% endfor %}"
    "{{ '</function>\\n</tool_call>' }}"
)
_GLM_CALL = (
    "{{ '\\n<tool_call>' + call.function.name + '\\n' }}"
    "{% for key, value in call.function.arguments | items %}"
    "{{ '<arg_key>' + key + '</arg_key>\\n<arg_value>' + (value if value is string else value | tojson) + "
    "'</arg_value>\\n' }}{% endfor %}{{ '</tool_call>' }}"
)
_MINIMAX_CALL = (
    "{{ '\\n<minimax:tool_call>\\n' if loop.first else '' }}"
    "{{ '<invoke name=\"' + call.function.name + '\">\\n' }}"
    "{% for key, value in call.function.arguments | items %}"
    "{{ '<parameter name=\"' + key + '\">' + (value if value is string else value | tojson) + "
    "'</parameter>\\n' }}{% endfor %}{{ '</invoke>\\n' }}"
    "{{ '</minimax:tool_call>' if loop.last else '' }}"
)
_GRANITE_CALL = (
    "{{ '<|tool_call|>[' if loop.first else ', ' }}{{ call.function | tojson }}{{ ']' if loop.last else '' }}"
)
_HUNYUAN_CALL = (
    "{{ '<tool_calls>[' if loop.first else ', ' }}{{ call.function | tojson }}"
    "{{ ']</tool_calls>' if loop.last else '' }}"
)
_DSML_CALL = (
    "{{ '\\n\\n<' + dsml + 'function_calls>\\n' if loop.first else '\\n' }}"
    "{{ '<' + dsml + 'invoke name=\"' + call.function.name + '\">\\n' }}"
    "{% for key, value in call.function.arguments | items %}"
    "{{ '<' + dsml + 'parameter name=\"' + key }}"
    "{{ '\" string=\"' + ('true' if value is string else 'false') + '\">' }}"
    "{{ (value if value is string else value | tojson) + '</' + dsml + 'parameter>\\n' }}{% endfor %}"
    "{{ '</' + dsml + 'invoke>' + ('\\n</' + dsml + 'function_calls>' if loop.last else '') }}"
)

HERMES: Final = _CHATML.replace("CALL", _HERMES_CALL)
QWEN_CODER: Final = _CHATML.replace("CALL", _CODER_CALL)
GLM: Final = _CHATML.replace("CALL", _GLM_CALL)
MINIMAX: Final = _CHATML.replace("CALL", _MINIMAX_CALL).replace(
    "'<|im_start|>assistant\\n' }}{% endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
DEEPSEEK_V32: Final = "{% set dsml = '｜DSML｜' %}" + _CHATML.replace("CALL", _DSML_CALL)
DEEPSEEK_V4: Final = DEEPSEEK_V32.replace("function_calls", "tool_calls")
GRANITE: Final = _CHATML.replace("CALL", _GRANITE_CALL)
HUNYUAN: Final = _CHATML.replace("CALL", _HUNYUAN_CALL)

MISTRAL: Final = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS][INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '[TOOL_CALLS] [' if loop.first else ', ' }}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ']' if loop.last else '' }}
{%- endfor %}{% endif %}
{%- endfor %}"""  # noqa: E501

MISTRAL_NAMED: Final = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS][INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}
{{- '[THINK]' + m.reasoning_content + '[/THINK]' if m.reasoning_content else '' }}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
{%- endfor %}{% endif %}
{%- endfor %}"""  # noqa: E501

DEEPSEEK_R1: Final = """\
{{- tools | tojson if tools else '' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content + '<｜Assistant｜><think>\\n' }}
{%- elif m.role == 'assistant' %}
{{- m.reasoning_content + '\\n</think>\\n\\n' }}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
{{- (call.function.arguments | tojson) + '\\n```<｜tool▁call▁end｜>' }}
{{- '<｜tool▁calls▁end｜>' if loop.last else '' }}
{%- endfor %}{% endif %}
{%- endfor %}"""

DEEPSEEK_V31: Final = """\
{{- tools | tojson if tools else '' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content + '<｜Assistant｜></think>' }}
{%- elif m.role == 'assistant' %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '<｜tool▁calls▁begin｜>' if loop.first else '' }}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + (call.function.arguments | tojson) }}
{{- '<｜tool▁call▁end｜>' + ('<｜tool▁calls▁end｜>' if loop.last else '') }}
{%- endfor %}{% endif %}
{%- endfor %}"""

KIMI: Final = """\
{{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' if tools else '' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_user|>user<|im_middle|>' + m.content + '<|im_end|>' }}
{%- elif m.role == 'assistant' %}{{ '<|im_assistant|>assistant<|im_middle|>' }}
{{- '<think>' + (m.reasoning_content or '') + '</think>' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '<|tool_calls_section_begin|>' if loop.first else '' }}
{{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' + (call.function.arguments | tojson) }}
{{- '<|tool_call_end|>' + ('<|tool_calls_section_end|>' if loop.last else '') }}
{%- endfor %}{{ '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""

LLAMA: Final = """\
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + (tools | tojson if tools else '') + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '}' }}
{%- else %}{{ m.content }}{% endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

HARMONY: Final = """\
{{- '<|start|>developer<|message|>' + (tools | tojson if tools else '') + '<|end|>' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' %}
{%- if m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}
{%- if m.tool_calls %}
{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
{{- '<|channel|>commentary json<|message|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

GEMMA: Final = """\
{%- macro written(v) %}
{%- if v is string %}{{ '<|"|>' + v + '<|"|>' }}
{%- elif v is boolean %}{{ 'true' if v else 'false' }}
{%- elif v is none %}null
{%- elif v is mapping %}{{ '{' }}{% for key, value in v | items %}{{ key }}:{{ written(value) }}{{ '' if loop.last else ',' }}{% endfor %}{{ '}' }}
{%- elif v is sequence %}{{ '[' }}{% for value in v %}{{ written(value) }}{{ '' if loop.last else ',' }}{% endfor %}{{ ']' }}
{%- else %}{{ v }}{% endif %}
{%- endmacro %}
{{- '<|turn>system\\n' + (tools | tojson if tools else '') + '<turn|>\\n' }}
{%- for m in messages %}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.reasoning_content %}{{ '<|channel>thought\\n' + m.reasoning_content + '\\n<channel|>' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '<|tool_call>call:' + call.function.name + written(call.function.arguments) + '<tool_call|>' }}
{%- endfor %}
{{- '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"""  # noqa: E501

ALL: Final = {
    "gemma": GEMMA,
    "hermes": HERMES,
    "qwen_coder": QWEN_CODER,
    "glm": GLM,
    "minimax": MINIMAX,
    "deepseek_v32": DEEPSEEK_V32,
    "deepseek_v4": DEEPSEEK_V4,
    "granite": GRANITE,
    "hunyuan": HUNYUAN,
    "mistral": MISTRAL,
    "mistral_named": MISTRAL_NAMED,
    "deepseek_r1": DEEPSEEK_R1,
    "deepseek_v31": DEEPSEEK_V31,
    "kimi": KIMI,
    "llama": LLAMA,
    "harmony": HARMONY,
}
# What each can say: one call in an answer, no reasoning, no text beside calls.
ONE_CALL: Final = {"llama", "harmony"}
NO_REASONING: Final = {"mistral", "deepseek_v31", "llama"}
ONLY_CALLS: Final = {"llama", "harmony"}
