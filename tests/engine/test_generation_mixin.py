"""What transformers asks of a class that generates, asked of streamed models of seven architectures.

Its ``GenerationTesterMixin`` is in no package, so its checks are made anew here, under its names where it has them.
Each has the outcome that the resident model has, to the bit; what is an error there is one of that kind or of ours.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import tiny_models
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)  # fmt: skip

from airllm_nb.engine.facade import StreamedModel
from airllm_nb.errors import AirLLMError

pytestmark = pytest.mark.usefixtures("one_thread")

# Plain, with learned positions, with biases, of two kinds of attention, of sliding windows, of experts, and a hybrid.
KINDS = ["llama", "gpt2", "qwen2", "gemma3_text", "mistral", "qwen3_moe", "qwen3_next"]
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(IDS)
NEW = 4
ALL = {
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True,
    "output_attentions": True,
}  # fmt: skip


class Pair(NamedTuple):
    """A model that streams, the same resident, and a draft for both."""

    streamed: StreamedModel
    resident: Any
    draft: Any


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder, other = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("draft")
    tiny_models.save_tiny(request.param, folder)
    tiny_models.save_tiny("llama", other, seed=1)
    # Frozen: PyTorch multiplies some strided states in another way where a weight asks for a gradient.
    resident = tiny_models.resident(folder).requires_grad_(False)
    resident.set_attn_implementation("eager")  # the others have no attentions to give
    with tiny_models.streamed(folder, max_seq_len=64, batch_size=2, attn_implementation="eager") as model:
        yield Pair(model, resident, tiny_models.resident(other))


def run(model: Any, ids: Any = IDS, **options: Any) -> Any:
    """``generate`` of a few tokens."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    if ids is IDS:
        settings["attention_mask"] = MASK
    return model.generate(*([] if ids is None else [ids]), **settings | options)


def outcome(model: Any, check: Callable[..., Any], draft: Any) -> Any:
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return check(model, *([draft] if "draft" in inspect.signature(check).parameters else []))
    except Exception as error:
        return error


def plain(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """What an outcome consists of, as lists, names of classes and tensors."""
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, (str, int, float, bool)):
        return value
    if id(value) in seen:
        return "itself"
    inner = (*seen, id(value))
    if isinstance(value, dict):
        return [type(value).__name__, *((key, plain(each, inner)) for key, each in value.items())]
    if isinstance(value, (list, tuple)):
        return [plain(each, inner) for each in value]
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    parts = {name: each for name, each in vars(value).items() if "config" not in name}
    return [type(value).__name__, *((name, plain(each, inner)) for name, each in sorted(parts.items()))]


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor) and found.dtype == expected.dtype
        assert found.shape == expected.shape and torch.equal(found.nan_to_num(), expected.nan_to_num())
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


# ---- the checks ------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., Any]] = {}
# ``generate`` with these options.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy_generate": {},
    "greedy_generate_dict_outputs": ALL | {"use_cache": False},
    "greedy_generate_dict_outputs_use_cache": ALL,
    "sample_generate": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7, "num_return_sequences": 3},
    "sample_generate_dict_output": ALL | {"do_sample": True, "use_cache": False, "num_return_sequences": 2},
    "beam_search_generate": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0},
    "beam_search_generate_dict_output": ALL | {"num_beams": 2, "use_cache": False},
    "beam_search_generate_dict_outputs_use_cache": ALL | {"num_beams": 2, "num_return_sequences": 2},
    "beam_sample_generate": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "beam_sample_generate_dict_output": ALL | {"num_beams": 2, "do_sample": True},
    "group_beam_search_generate": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 2.0},
    "constrained_beam_search_generate": {"num_beams": 4, "force_words_ids": [[7, 9]]},
    "contrastive_generate": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_decoding_sample": {"dola_layers": "low"},
    "generate_with_static_cache": ALL | {"cache_implementation": "static"},
    "generate_with_offloaded_cache": {"cache_implementation": "offloaded"},
    "generate_with_offloaded_static_cache": {"cache_implementation": "offloaded_static"},
    "generate_with_quant_cache": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "generate_with_an_unknown_cache": {"cache_implementation": "none such"},
    "generate_methods_with_logits_to_keep": {"logits_to_keep": 0},
    "generate_without_cache": {"use_cache": False},
    "prefill_chunks": {"prefill_chunk_size": 4},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash"), "do_sample": True},
    "stop_strings_without_a_tokenizer": {"stop_strings": ["x"]},
    "max_time": {"max_time": 600.0},
    "max_length": {"max_new_tokens": None, "min_new_tokens": None, "max_length": 12},
    "max_length_below_the_prompt": {"max_new_tokens": None, "min_new_tokens": None, "max_length": 3},
    "no_new_tokens": {"max_new_tokens": 0, "min_new_tokens": None},
    "min_length_above_max_length": {"min_new_tokens": NEW + 1},
    "eos_tokens": {"eos_token_id": list(range(3, 130)), "min_new_tokens": None, "max_new_tokens": 12},
    "forced_tokens": {"forced_bos_token_id": 5, "forced_eos_token_id": 6},
    "begin_suppress_tokens": {"begin_suppress_tokens": [4, 5], "suppress_tokens": [6]},
    "sequence_bias": {"sequence_bias": [[[7], 5.0], [[8, 9], -3.0]]},
    "bad_words": {"bad_words_ids": [[7], [8, 9]], "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "prefix_allowed_tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [10 + row, 20 + len(ids)]},
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": IDS[:, :3]},
    "warpers": {"do_sample": True, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
    "renormalised_logits": ALL | {"renormalize_logits": True, "temperature": 0.5, "do_sample": True},
    "several_greedy_sequences": {"num_return_sequences": 2},
    "prompt_lookup_of_two_rows": {"prompt_lookup_num_tokens": 2},
    "unknown_argument": {"none_such": 1},
    "unknown_custom_generate": {"custom_generate": "none/such"},
    "num_beams_zero": {"num_beams": 0},
    "temperature_of_zero": {"do_sample": True, "temperature": 0.0},
    "a_mask_of_zeros": {"attention_mask": torch.zeros_like(IDS)},
}  # fmt: skip


# What transformers refuses, or this machine cannot do; of a hybrid it has no drafts checked either.
REFUSED = {
    "group_beam_search_generate", "constrained_beam_search_generate", "contrastive_generate", "dola_decoding_sample",
    "generate_with_offloaded_cache", "generate_with_offloaded_static_cache", "generate_with_quant_cache",
    "generate_with_an_unknown_cache", "stop_strings_without_a_tokenizer", "max_length_below_the_prompt",
    "no_new_tokens", "several_greedy_sequences", "prompt_lookup_of_two_rows", "unknown_argument",
    "unknown_custom_generate", "num_beams_zero", "temperature_of_zero", "generate_from_an_empty_batch",
}  # fmt: skip
DRAFTS = re.compile("assisted|prompt_lookup")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    CHECKS[function.__name__] = function
    return function


def with_options(name: str) -> Callable[[Any], Any]:
    return lambda model: run(model, **copy.deepcopy(OPTIONS[name]))


CHECKS.update({name: with_options(name) for name in OPTIONS})


@check
def inherits_generation_mixin(model: Any) -> Any:
    return isinstance(model, GenerationMixin), model.can_generate(), type(model.generation_config).__name__


@check
def generate_without_input_ids(model: Any) -> Any:
    return run(model, None)


@check
def generate_from_an_empty_batch(model: Any) -> Any:
    return run(model, torch.empty(0, 4, dtype=torch.long))


@check
def assisted_decoding_matches_greedy_search_by_another(model: Any, draft: Any) -> Any:
    return run(model, IDS[:1], assistant_model=draft, **ALL)


@check
def assisted_decoding_matches_greedy_search_by_itself(model: Any) -> Any:
    return run(model, IDS[:1], assistant_model=model, **ALL)


@check
def assisted_decoding_sample(model: Any, draft: Any) -> Any:
    return run(model, IDS[:1], assistant_model=draft, do_sample=True)


@check
def assisting_another(model: Any, draft: Any) -> Any:
    return run(draft, IDS[:1], assistant_model=model)


@check
def prompt_lookup_decoding_matches_greedy_search(model: Any) -> Any:
    return run(model, IDS[:1].repeat(1, 2), prompt_lookup_num_tokens=2, max_new_tokens=8, **ALL)


@check
def prompt_lookup_decoding_stops_at_eos(model: Any) -> Any:
    end = run(model, IDS[:1])[0, -2].item()
    return run(model, IDS[:1].repeat(1, 2), prompt_lookup_num_tokens=2, eos_token_id=end, min_new_tokens=None)


def padded(by: int) -> tuple[torch.Tensor, torch.Tensor]:
    zeros = torch.zeros(2, by, dtype=torch.long)
    return torch.cat([zeros, IDS], 1), torch.cat([zeros, MASK], 1)


@check
def left_padding_compatibility(model: Any) -> Any:
    ids, mask = padded(3)
    return model(ids, attention_mask=mask).logits, run(model, ids, attention_mask=mask, **ALL)


@check
def left_padding_with_a_static_cache(model: Any) -> Any:
    ids, mask = padded(2)
    return run(model, ids, attention_mask=mask, cache_implementation="static")


@check
def past_key_values_format(model: Any) -> Any:
    return model(IDS, use_cache=True).past_key_values


@check
def forward_outputs(model: Any) -> Any:
    return model(IDS, labels=IDS, output_hidden_states=True, output_attentions=True), model(IDS, return_dict=False)


@check
def forward_of_logits_to_keep(model: Any) -> Any:
    return model(IDS, logits_to_keep=1).logits, model(IDS, logits_to_keep=torch.tensor([0, 3])).logits


@check
def generate_from_random_inputs_embeds(model: Any) -> Any:
    embeds = torch.randn(2, 5, model.config.hidden_size)
    return run(model, None, inputs_embeds=embeds, **ALL), run(model, None, inputs_embeds=embeds, num_beams=2)


@check
def generate_from_inputs_embeds(model: Any) -> Any:
    embeds = model.get_input_embeddings()(IDS)
    return run(model, inputs_embeds=embeds), run(model, None, inputs_embeds=embeds, attention_mask=MASK)


@check
def generate_from_inputs_embeds_with_static_cache(model: Any) -> Any:
    embeds = model.get_input_embeddings()(IDS)
    return run(model, None, inputs_embeds=embeds, cache_implementation="static", return_dict_in_generate=True)


@check
def generate_continue_from_past_key_values(model: Any) -> Any:
    first = run(model, return_dict_in_generate=True)
    mask = torch.ones_like(first.sequences)
    return run(model, first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **ALL)


@check
def generate_continue_from_inputs_embeds(model: Any) -> Any:
    embeds = model.get_input_embeddings()(IDS)
    first = run(model, None, inputs_embeds=embeds, return_dict_in_generate=True)
    more = torch.cat([embeds, model.get_input_embeddings()(first.sequences)], 1)
    return run(model, None, inputs_embeds=more, past_key_values=first.past_key_values)


@check
def generate_into_caches_that_are_given(model: Any) -> Any:
    made = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)
    return [(run(model, past_key_values=cache), cache.get_seq_length()) for cache in made]


@check
def compute_transition_scores(model: Any) -> Any:
    beams = run(model, num_beams=2, return_dict_in_generate=True, output_scores=True)
    greedy = run(model, return_dict_in_generate=True, output_scores=True)
    return [
        model.compute_transition_scores(each.sequences, each.scores, each.get("beam_indices"), normalize_logits=True)
        for each in (beams, greedy)
    ]


@check
def custom_logits_processors_run_in_order(model: Any) -> Any:
    seen = []

    def processor(name: str) -> Callable[..., torch.Tensor]:
        return lambda ids, scores: (seen.append((name, tuple(ids.shape))), scores.roll(1, -1))[1]

    made = LogitsProcessorList([processor("first"), processor("second")])
    return run(model, logits_processor=made, repetition_penalty=1.2, **ALL), seen


@check
def a_processor_that_runs_the_model(model: Any) -> Any:
    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 0.5 * model(ids[:, -2:]).logits[:, -1]

    return run(model, logits_processor=LogitsProcessorList([processor]))


@check
def stopping_criteria(model: Any) -> Any:
    seen: list[Any] = []

    def at_eleven(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append(ids.shape)
        return torch.full((len(ids),), ids.shape[1] >= 11)

    criteria = StoppingCriteriaList([at_eleven])
    return run(model, stopping_criteria=criteria, max_new_tokens=9), seen


@check
def stopping_criteria_beside_max_new_tokens(model: Any) -> Any:
    return run(model, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(11)]))


@check
def custom_generate_callable(model: Any) -> Any:
    def twice(model: Any, input_ids: torch.Tensor, generation_config: Any, extra: int = 0, **kwargs: Any) -> Any:
        return model(input_ids).logits.argmax(-1) + extra, generation_config.max_new_tokens, sorted(kwargs)

    return run(model, custom_generate=twice, extra=3)


@check
def generation_config_is_not_changed(model: Any) -> Any:
    given = GenerationConfig(max_new_tokens=3, num_beams=2, do_sample=False)
    before, own = given.to_dict(), model.generation_config.to_dict()
    made = model.generate(IDS, generation_config=given, attention_mask=MASK, min_new_tokens=2)
    return made, given.to_dict() == before, model.generation_config.to_dict() == own


@check
def generation_config_by_position(model: Any) -> Any:
    return model.generate(IDS, GenerationConfig(max_new_tokens=3, do_sample=False), attention_mask=MASK)


@check
def generation_config_of_the_model(model: Any) -> Any:
    own = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=3, num_beams=3, do_sample=False, repetition_penalty=1.3)
    try:
        return model.generate(IDS, attention_mask=MASK), model.generate(IDS, attention_mask=MASK, num_beams=1)
    finally:
        model.generation_config = own


@check
def prepare_inputs_for_generation_kwargs_forwards(model: Any) -> Any:
    made = model.prepare_inputs_for_generation(IDS, past_key_values=None, attention_mask=MASK, use_cache=True)
    return sorted(made), made["input_ids"]


@check
def generate_with_and_without_position_ids(model: Any) -> Any:
    positions = torch.arange(IDS.shape[1])[None].expand(2, -1)
    return run(model, position_ids=positions), run(model, position_ids=positions + 2)


@check
def signature(model: Any) -> Any:
    return str(inspect.signature(model.forward)), str(inspect.signature(model.generate))


@check
def a_streamer(model: Any) -> Any:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.got.append("end")

    one, beams = Streamer(), Streamer()
    run(model, IDS[:1], streamer=one)
    try:
        run(model, IDS[:1], streamer=beams, num_beams=2)
    except ValueError:
        beams.got.append("refused")
    return one.got, beams.got


@check
def generate_in_training_mode(model: Any) -> Any:
    model.train()
    try:
        return run(model)
    finally:
        model.eval()


@check
def no_gradient_is_kept(model: Any) -> Any:
    with torch.enable_grad():
        made = run(model, return_dict_in_generate=True, output_logits=True)
    return [logits.requires_grad for logits in made.logits]


@check
def outputs_can_be_edited(model: Any) -> Any:
    logits = model(IDS).logits
    logits += 1
    logits[..., 0] = 0
    return logits


@pytest.mark.parametrize("name", CHECKS)
def test_the_outcome_is_the_resident_models(pair: Pair, name: str) -> None:
    expected, found = (outcome(model, CHECKS[name], pair.draft) for model in (pair.resident, pair.streamed))
    if isinstance(expected, Exception):
        is_stateful = getattr(pair.resident, "_is_stateful", False)
        assert name in REFUSED or (is_stateful and DRAFTS.search(name)), expected
        assert isinstance(found, (type(expected), AirLLMError)), (found, expected)
    elif isinstance(found, Exception):
        raise found
    else:
        assert_same(plain(found), plain(expected))
