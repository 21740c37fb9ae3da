"""Chat templates of the kinds that real tokenizers have."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# refuses a system turn
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)

# drops a system turn without a word
SILENT = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
)

# refuses two turns of one role in a row, and a dialogue that the assistant begins
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% endfor %}" + CHATML
)

# leaves the last reply open: the next turn ends it (GLM)
LEFT_OPEN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# writes a token behind every reply but the last (Apertus)
ENDED_LATER = LEFT_OPEN.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}"
    "{% if m['role'] != 'assistant' or not loop.last %}<|end_of_turn|>{% endif %}",
)

# writes a channel before a reply that the generation prompt leaves to the model (gpt-oss)
CHANNEL = (
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|end_of_turn|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# an empty block of thoughts before a reply, which the generation prompt lacks (Kimi K2 Thinking)
CLOSED_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# the generation prompt opens thoughts, whatever is asked for; replies have none (R1)
OPENS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

# the generation prompt writes an empty block; replies have none (Gemma 4, MiniCPM 5)
EMPTY_THOUGHTS = OPENS_THOUGHTS.replace("<think>\n", "<think>\n\n</think>\n\n")

# leaves thoughts open before a reply (Nemotron Nano 2)
LEFT_IN_THOUGHTS = CLOSED_THOUGHTS.replace("<think></think>", "<think>\n").replace(
    "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
)

# thinks when asked to; the last reply has its block, perhaps empty (Qwen 3)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}"
    "<think>\n\n</think>\n\n{% endif %}"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

# closes thoughts that it has not opened (GLM 4.7, DeepSeek V4)
ENDS_THOUGHTS = CLOSED_THOUGHTS.replace("<think></think>", "</think>").replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
)

# blank space before a reply that the generation prompt lacks (Reka)
BLANK = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|sep|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# asks for the next reply behind every dialogue (Command R7B)
ALWAYS_ASKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
)

# every turn begins with one token, and none ends it
ONLY_BEGINNINGS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# no tokens at all (RWKV)
NO_TOKENS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# line breaks and markup that the vocabulary has as added tokens stand before the end (Gemma)
MARKUP = CHATML.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] }}\n<b></b><turn_end>")

# wants content as a list; of a text it writes nothing
LISTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}",
)

# the system text stands in the last user turn, if the dialogue ends with one (Mistral Nemo)
SYSTEM_LAST = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'user' %}{{ system }}\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# loses the text of every turn
LOSES_TEXTS = CHATML.replace("m['content']", "m['text']")

# loses the reply
LOSES_REPLY = CHATML.replace(
    "{{ m['content'] }}", "{% if not loop.last %}{{ m['content'] }}{% endif %}"
)

# fail
UNDEFINED = "{{ functions.pop() }}" + CHATML
TYPE_ERROR = "{% for tool in tools %}{{ tool }}{% endfor %}" + CHATML
BAD_SYNTAX = CHATML + "{% endfor %}"
