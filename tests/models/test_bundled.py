"""The bundled model is what its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models import BUNDLED
from models.data import detokenise, strip_markup, wikitext_text
from models.evaluate_card import facts, load, score, scores
from models.fetch import DEFAULT_CACHE
from models.llama import Config, Llama

SAMPLE = Path(__file__).parent / "wikitext2_test_first_article.txt"  # CC BY-SA, from Wikipedia
CARD = (BUNDLED / "README.md").read_text()


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(BUNDLED)


def card_perplexity(name: str) -> float:
    line = next(line for line in CARD.splitlines() if line.startswith(f"| {name} |"))
    return float(line.split("|")[2])


def test_config_is_a_small_untied_llama_with_grouped_queries() -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == "bfloat16"
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_attention_heads"] > config["num_key_value_heads"]


def test_weights_fit_in_sixteen_mebibytes() -> None:
    assert (BUNDLED / "model.safetensors").stat().st_size <= 16 * 2**20


def test_the_files_say_what_the_card_says() -> None:
    assert [line for line in facts(BUNDLED) if line not in CARD] == []


def test_embeddings_and_head_are_different_weights(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("text", ["", " ", "Hello, world.", "naïve  Ænima\t\r\n½", "日本語 🎉👩‍🚀", "\x00\x7f é"])
def test_every_text_round_trips(loaded: tuple[Any, Any], text: str) -> None:
    _, tokenizer = loaded
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(index > 1 for index in ids)


def test_special_tokens_have_the_ids_of_the_config(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id)
    assert len(tokenizer) == model.config.vocab_size


def test_training_model_and_transformers_compute_the_same_logits(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ours = Llama(Config())
    ours.load_state_dict(model.state_dict())
    ids = torch.tensor([tokenizer("The city was founded in the year 1200 by").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_perplexity_is_that_of_the_card(loaded: tuple[Any, Any]) -> None:
    measured = score(*loaded, SAMPLE.read_text(), 256).token_perplexity
    assert measured < 1.01 * card_perplexity("its first article, 256")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_card_can_be_reproduced() -> None:
    lines = scores(BUNDLED, wikitext_text("test", DEFAULT_CACHE))
    assert [line for line in lines if line not in CARD] == []


def test_wiki_markup_becomes_prose() -> None:
    page = (
        "{{Infobox|a={{b}}}}'''Paris''' is the [[capital city|capital]] "
        "of [[France]],&lt;ref&gt;x&lt;/ref&gt; on the river Seine in the north.\n"
        "== See also ==\n* [[Lyon]]\n[[fr:Paris]]"
    )
    assert strip_markup(page) == "Paris is the capital of France, on the river Seine in the north."


def test_spaced_text_becomes_ordinary_writing() -> None:
    spaced = ' He said " yes " ( twice ) , in a well @-@ known 1 @,@ 000 @.@ 5 . '
    assert detokenise(spaced) == 'He said "yes" (twice), in a well-known 1,000.5.'
