"""The tokenizer against the checkpoint's own library calls, the fixtures and the real Llama 4 vocabulary."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
import tokenizers

from outrider.errors import ConfigError
from outrider.models.gguf import embedded_model_path
from outrider.text.chat_template import ChatTemplate
from outrider.text.tokenizer import Tokenizer

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[3] / "shared"))
TINY = SHARED / "fixtures" / "llama4-tiny-a" / "bf16"
needs_fixtures = pytest.mark.skipif(not TINY.is_dir(), reason="the shared fixtures are not here")


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.load(TINY)


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    return Tokenizer.load(embedded_model_path())


@pytest.fixture(scope="module")
def llama4(llama4_folder: Path) -> Tokenizer:
    return Tokenizer.load(llama4_folder)


def random_text(rng: random.Random, length: int) -> str:
    """Characters of several scripts, digits, runs of blanks, emoji, and pieces of control tokens."""
    alphabets = [
        "abc XYZ",
        "0123456789",
        " \t\n\r",
        "éßøñ",
        "漢字かな",
        "🙂👩‍💻🇫🇷",
        "<|>eot_im",
        "مرحبا",
        "\u200d\u0301",
    ]
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(length))


@needs_fixtures
def test_tiny_agrees_with_fixture(tiny: Tokenizer) -> None:
    """Guards BOS handling: added by default, left out on request."""
    import json

    check = json.loads((TINY.parent / "refs.json").read_text())["tokenizer_check"]
    assert tiny.encode(check["text"]) == check["ids"]
    assert tiny.encode(check["text"], add_special_tokens=False) == check["ids_no_special"]
    assert tiny.encode(check["chat_text"], add_special_tokens=False, allow_special=True) == check["chat_ids"]
    assert tiny.decode(check["chat_ids"]) == check["chat_text"]
    assert (tiny.bos_token_id, tiny.eos_token_id) == (992, 1000)


@needs_fixtures
def test_ordinary_text_agrees_with_the_library(tiny: Tokenizer) -> None:
    """Guards against a wrapper that changes what the checkpoint's tokenizer does with plain text."""
    oracle = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    rng = random.Random()
    for _ in range(50):
        text = random_text(rng, rng.randrange(80)).replace("<", "").replace("|", "")
        assert tiny.encode(text) == oracle.encode(text).ids, repr(text)


@needs_fixtures
def test_user_text_never_becomes_a_special_token(tiny: Tokenizer) -> None:
    """Guards against prompt injection by spelling a control token, alone, doubled or inside other text."""
    for token in tiny.special_tokens:
        for text in (token, f"a{token}b", token * 2, f" {token}\n", token[1:] + token, token[:-1] + token):
            ids = tiny.encode(text, add_special_tokens=False)
            assert not tiny.special_ids & set(ids), text
            assert tiny.decode(ids) == text
        assert tiny.encode(token, add_special_tokens=False, allow_special=True) == [
            tiny.special_tokens[token]
        ]


@needs_fixtures
def test_pieces_join_to_the_decoded_text(tiny: Tokenizer, smol: Tokenizer) -> None:
    """Guards the byte table: joined token bytes must be what the library decodes, for any ids."""
    rng = random.Random()
    for tokenizer in (tiny, smol):
        for _ in range(50):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(40)]
            joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode("utf-8", "replace")
            assert joined == tokenizer.decode(ids)


def test_sentencepiece_style_pieces(tmp_path: Path) -> None:
    """Guards tokenizers that write blanks as U+2581 and rare bytes as <0xAB> (Llama 2 and its kin)."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", *alphabet])
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<s>", fuse_unk=True))
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    made.train_from_iterator(["some words to learn from, and some more words"], trainer)
    steps = [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    made.decoder = tokenizers.decoders.Sequence(steps)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    text = " some words 🙂 é more"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text
    assert any(len(tokenizer.token_bytes(i)) == 1 and tokenizer.token_bytes(i)[0] > 127 for i in ids)


@needs_fixtures
def test_ids_outside_the_vocabulary_are_empty(tiny: Tokenizer) -> None:
    """Guards against a crash on padded vocabulary rows."""
    assert tiny.token_bytes(10**6) == b"" == tiny.token_bytes(-1)
    assert tiny.token_str(tiny.vocab_size) == "" == tiny.token_name(tiny.vocab_size)


def test_gguf_splits_digits_singly(smol: Tokenizer) -> None:
    """Guards the `smollm` pre-tokenizer: without its digit step '   123' begins with two tokens."""
    assert smol.encode("   123") == [333, 33, 34, 35]
    assert smol.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smol.encode("def fibonacci(n):\n") == [1604, 3987, 46477, 24, 94, 727, 198]
    assert (smol.bos_token_id, smol.eos_token_id, smol.vocab_size) == (1, 2, 49152)
    assert len(smol.special_tokens) == 17


def test_gguf_agrees_with_transformers_but_for_digits(smol: Tokenizer) -> None:
    """Guards merges and byte alphabet of the GGUF path against transformers' own conversion."""
    transformers = pytest.importorskip("transformers")
    path = embedded_model_path()
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rng = random.Random()
    for _ in range(40):
        text = "".join(c for c in random_text(rng, 60) if not c.isdigit() and c not in "<|>")
        assert smol.encode(text) == oracle.encode(text), repr(text)


def test_threads_share_one_tokenizer(smol: Tokenizer) -> None:
    """Guards against state in the tokenizer: 4 threads, plain and trusted text interleaved."""
    text = "Hello <|im_end|> world"
    plain, trusted = smol.encode(text), smol.encode(text, allow_special=True)
    wrong: list[list[int]] = []

    def work() -> None:
        for _ in range(200):
            wrong.extend(ids for ids in (smol.encode(text),) if ids != plain)
            wrong.extend(ids for ids in (smol.encode(text, allow_special=True),) if ids != trusted)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plain != trusted
    assert not wrong


def test_broken_folders_are_refused_clearly(tmp_path: Path) -> None:
    """Guards the start-up message for folders without, or with a damaged, tokenizer."""
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.slow
def test_real_llama4_vocabulary(llama4: Tokenizer) -> None:
    """Guards the recipe's `prompt_tokens: 5` and the control ids of the real model."""
    assert llama4.encode("San Francisco is a") == [200000, 33300, 20748, 373, 262]
    assert llama4.vocab_size == 202048
    assert len(llama4.special_tokens) == 2048
    assert llama4.eos_token_id == 200008
    joined = "".join(llama4.special_tokens)
    assert not llama4.special_ids & set(llama4.encode(joined, add_special_tokens=False))
    ids = llama4.encode(joined, add_special_tokens=False, allow_special=True)
    assert ids == list(llama4.special_tokens.values())


@pytest.mark.slow
def test_real_llama4_agrees_with_metas_encoder(llama4: Tokenizer) -> None:
    """Guards against a divergence from the encoder the model was trained with."""
    meta = pytest.importorskip("llama_models.llama4.tokenizer").Tokenizer.get_instance()
    rng = random.Random()
    for _ in range(40):
        text = random_text(rng, 120)
        assert llama4.encode(text, add_special_tokens=False) == meta.encode(text, bos=False, eos=False)
    template = ChatTemplate(llama4.chat_template or "", llama4.special_tokens, llama4.named_tokens)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\n Hi! <|eot|>"}]
    ids = llama4.encode_segments(template.render(messages))
    trusted = [
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|><|header_start|>user<|header_end|>",
        "<|eot|><|header_start|>assistant<|header_end|>\n\n",
    ]
    first, last = (meta.encode(text, bos=False, eos=False, allowed_special="all") for text in trusted)
    assert ids == [*first, *meta.encode("\n\n\n Hi! <|eot|>", bos=False, eos=False), *last]
