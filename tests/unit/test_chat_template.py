"""The chat template against transformers' rendering, and against users who spell control tokens."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError, RequestError
from outrider.models.gguf import embedded_model_path
from outrider.text.chat_template import ChatTemplate
from outrider.text.tokenizer import Tokenizer

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[3] / "shared"))
TINY = SHARED / "fixtures" / "llama4-tiny-a" / "bf16"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="the shared fixtures are not here")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city, e.g. 'Köln' & <others>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

RICH = """{{ bos_token }}{% for m in messages %}{% if loop.index0 > 8 %}{% break %}{% endif -%}
<|header_start|>{{ m.role }}<|header_end|>

{% if m.content is string %}{{ m.content | trim }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}
{% generation %}{% for call in m.tool_calls or [] %}{{ call | tojson(indent=2) }}{% endfor %}{% endgeneration %}
{{ (m.name or '') ~ '<|eot|>' }}
{%- endfor %}
{% if tools %}{{ '<|python_start|>' + tools | tojson + '<|python_end|>' }}{% endif %}
{% if documents %}{{ documents }}{% endif %}{{ note | default('') }}
{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>{{ '\n\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.load(TINY)


@pytest.fixture(scope="module")
def oracle() -> Any:
    return pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(TINY)


def make(tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
    return ChatTemplate(
        source or tokenizer.chat_template or "", tokenizer.special_tokens, tokenizer.named_tokens
    )


def llama4_template() -> str:
    module = pytest.importorskip("transformers.models.llama4.processing_llama4")
    return str(module.chat_template)


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi!"}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "\n\n 2 < 3?  "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": " c"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Köln <é>"}}}],
        },
        {"role": "tool", "content": '{"t": 7}'},
    ],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("kind", ["checkpoint", "rich", "llama4"])
def test_renders_as_transformers(
    tiny: Tokenizer, oracle: Any, conversation: list[dict[str, Any]], with_tools: bool, kind: str
) -> None:
    """Guards whitespace control, tojson, loop controls and joint encoding of template and content."""
    source = {"checkpoint": tiny.chat_template, "rich": RICH, "llama4": llama4_template()}[kind]
    tools = TOOLS if with_tools else None
    for add_prompt in (False, True):
        expected = oracle.apply_chat_template(
            conversation, tools=tools, chat_template=source, add_generation_prompt=add_prompt, tokenize=False
        )
        segments = make(tiny, source).render(conversation, tools=tools, add_generation_prompt=add_prompt)
        ids = tiny.encode_segments(segments)
        assert tiny.decode(ids) == expected
        assert ids == oracle.encode(expected, add_special_tokens=False)


def test_embedded_model_template() -> None:
    """Guards the GGUF template: the default system text and the generation prompt."""
    smol = Tokenizer.load(embedded_model_path())
    ids = smol.encode_segments(make(smol).render([{"role": "user", "content": "Hi"}]))
    assert smol.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 3 and ids.count(2) == 2


@pytest.mark.parametrize("source", [None, RICH, "llama4"], ids=["checkpoint", "rich", "llama4"])
def test_no_field_can_bring_in_a_control_token(tiny: Tokenizer, source: str | None) -> None:
    """Guards against control tokens spelled whole in any field: content, parts, roles, names, tools, kwargs."""
    template = make(tiny, llama4_template() if source == "llama4" else source)

    def control(word: str) -> list[int]:
        tools = [
            {
                "type": "function",
                "function": {"name": word, "parameters": {word: {"enum": [word, f" {word}"]}}},
            }
        ]
        messages = [
            {"role": "system", "content": f" {word} "},
            {"role": "user", "content": [{"type": "text", "text": word}, {"type": "text", "text": word}]},
            {"role": word, "name": word, "content": f"{word}x{word}"},
            {
                "role": "assistant",
                "content": word,
                "tool_calls": [{"function": {"name": word, "arguments": {word: [word]}}}],
            },
            {"role": "tool", "content": f"\n{word}\n"},
        ]
        segments = template.render(
            messages, tools=tools, documents=[{"text": word}], variables={"note": word}
        )
        return [i for i in tiny.encode_segments(segments) if i in tiny.special_ids]

    expected = control("harmless")
    assert expected
    for token in tiny.special_tokens:
        assert control(token) == expected, token


@pytest.mark.parametrize("source", [None, RICH], ids=["checkpoint", "rich"])
def test_control_tokens_cannot_be_assembled_from_pieces(tiny: Tokenizer, source: str | None) -> None:
    """Guards against a token cut over adjoining parts, or joined when the template trims or concatenates."""
    template = make(tiny, source)
    rng = random.Random()
    for token in tiny.special_tokens:
        cut = rng.randrange(1, len(token))
        parts = [{"type": "text", "text": token[:cut]}, {"type": "text", "text": token[cut:]}]
        messages = [
            {"role": "user", "content": parts},
            {"role": "user", "content": f"{token[:cut]}  ", "name": token[cut:]},
            {"role": token[cut:], "content": "x"},
        ]
        plain = [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "name": "c"}]
        plain += [{"role": "user", "content": "x"}]
        counts = [
            sum(i in tiny.special_ids for i in tiny.encode_segments(template.render(m)))
            for m in (messages, plain)
        ]
        assert counts[0] == counts[1], token


def test_kwargs_cannot_replace_what_the_server_sets(tiny: Tokenizer) -> None:
    """Guards against chat_template_kwargs that swap the messages or the BOS text."""
    for name in ("messages", "tools", "add_generation_prompt", "bos_token"):
        with pytest.raises(RequestError, match=name):
            make(tiny).render(CONVERSATIONS[0], variables={name: "x"})


def test_refusals_are_request_errors(tiny: Tokenizer) -> None:
    """Guards against a template's exception that becomes a server error, or leaks its text."""
    template = make(tiny, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render(CONVERSATIONS[0])
    for source in (
        "{{ messages[7].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}x{{ 1/0 }}",
    ):
        with pytest.raises(RequestError, match="cannot render"):
            make(tiny, source).render(CONVERSATIONS[0])


def test_sandbox_keeps_python_out(tiny: Tokenizer) -> None:
    """Guards against template injection from a hostile checkpoint: attributes with underscores are undefined."""
    source = "{{ ().__class__.__base__.__subclasses__() }}"
    with pytest.raises(RequestError):
        make(tiny, source).render(CONVERSATIONS[0])
    with pytest.raises(ConfigError, match="line 2"):
        make(tiny, "\n{% for %}")


def test_continue_final_message(tiny: Tokenizer) -> None:
    """Guards prefill: the prompt ends inside the last message, without its end token."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Once upon"}]
    segments = make(tiny).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert tiny.decode(tiny.encode_segments(segments)).endswith("assistant<|header_end|>\n\nOnce upon")


def test_content_format_is_detected(tiny: Tokenizer) -> None:
    """Guards whether parts are passed as a list (templates that loop over content) or joined."""
    assert make(tiny).iterates_content
    assert make(
        tiny, "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{% endfor %}{% endfor %}"
    ).iterates_content
    assert not make(tiny, "{% for m in messages %}{{ m.content }}{% endfor %}").iterates_content
