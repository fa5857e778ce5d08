"""How conversations with DeepSeek-V4 become text: its checkpoints bring no chat template along.

Told as a template, so that everything that knows templates knows this one. ``thinking`` (or
``enable_thinking``) opens answers with a thought. What was thought before is left out unless tools
have answered. What tools say stands in a turn of the user; which tools there are, and how they are
called, is text of the system's turn and of answers.
"""

from __future__ import annotations

SPECIAL_TOKENS = ("<｜User｜>", "<｜Assistant｜>")

CHAT_TEMPLATE = """
{%- if tools -%}
    {{- raise_exception('tools are not rendered: write them into the system turn') -}}
{%- endif -%}
{%- set thinks = thinking | default(enable_thinking | default(false)) -%}
{%- set found = namespace(tools=false, asked=-1, previous='') -%}
{%- for turn in messages -%}
    {%- if turn.role == 'tool' -%}{%- set found.tools = true -%}{%- endif -%}
    {%- if turn.role in ('user', 'tool') -%}{%- set found.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- '<｜begin▁of▁sentence｜>' -}}
{%- for turn in messages -%}
    {%- if turn.tool_calls -%}
        {{- raise_exception('tool_calls are not rendered: write them into content') -}}
    {%- endif -%}
    {%- set content = turn.content or '' -%}
    {%- if turn.role in ('system', 'developer') -%}
        {{- content -}}
    {%- elif turn.role in ('user', 'tool') -%}
        {{- '\\n\\n' if found.previous == 'tool' else '<｜User｜>' -}}
        {{- '<tool_result>' + content + '</tool_result>' if turn.role == 'tool' else content -}}
    {%- elif turn.role == 'assistant' -%}
        {%- set thought = turn.reasoning_content -%}
        {{- '<｜Assistant｜>' -}}
        {%- if thinks and thought and (found.tools or loop.index0 > found.asked) -%}
            {{- '<think>' + thought -}}
        {%- endif -%}
        {{- '</think>' + content + '<｜end▁of▁sentence｜>' -}}
    {%- else -%}
        {{- raise_exception('the role ' + turn.role + ' is not known') -}}
    {%- endif -%}
    {%- set found.previous = turn.role -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<｜Assistant｜>' + ('<think>' if thinks else '</think>') -}}
{%- endif -%}
"""
