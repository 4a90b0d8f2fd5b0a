"""Tokenizers made in the test, each with other features of special tokens and templates."""

import json
from typing import Any

from fake_scheduler import demo_files, tokenizer_files
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox said no",
    "You are a helpful assistant. user system tool",
    '{"name": "get_weather", "x": 12}',
    "你好 世界",
] * 30

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" ~ (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.tool_calls is defined %}
        {{- '<|im_start|>assistant\\n' ~ message.content }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' ~ (call.function | tojson(indent=2)) ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

INST = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% else %}
        {% generation %}{{ ' ' + (message['content'] or '') + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""

PLAIN = """{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ message.name or '' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def demo() -> dict[str, bytes]:
    return demo_files()


def chatml() -> dict[str, bytes]:
    """As Qwen: byte-level, tools, special tokens of several kinds, the template in a file of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|strip|>", lstrip=True, rstrip=True, normalized=False)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": "not this one",
    }
    return tokenizer_files(tokenizer.to_str(), config, CHATML)


def llama_like() -> dict[str, bytes]:
    """As Llama 2: Metaspace and bytes, a begin token from the post-processor and in the template, named templates."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {
            "content": "<s>",
            "__type": "AddedToken",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        },
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": [{"name": "default", "template": INST}, {"name": "tool_use", "template": "{{ tools | tojson }}" + INST}],
    }
    return tokenizer_files(tokenizer.to_str(), config)


def roles_as_tokens() -> dict[str, bytes]:
    """As Phi: tokens built from roles. The config asks for a begin token, which does not count beside a tokenizer.json."""
    tokenizer = Tokenizer.from_str(chatml()["tokenizer.json"].decode())
    tokenizer.add_special_tokens(["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|end|>",
        "add_bos_token": True,
        "chat_template": PLAIN,
    }
    return tokenizer_files(tokenizer.to_str(), config)


ALL = (demo, chatml, llama_like, roles_as_tokens)
