"""Translate settings, requests and answers to vLLM's, and check what vLLM serves exactly."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import MAX_RANK, EngineConfig
from rayfin.errors import AdapterError, ConfigError, EngineFailed, ModelError, RequestError
from rayfin.methods import METHODS
from rayfin.models import Base, locate
from rayfin.models.ends import Ends
from rayfin.serving.engine.adapter import LORA_SETTINGS, PLAIN_INITS
from rayfin.serving.engine.checks import check_base, check_rank, modules_of
from rayfin.serving.engine.config_checks import require_vllm
from rayfin.serving.engine.peft_files import AdapterSettings, AdapterWeights, read_settings, shown
from rayfin.serving.engine.request import (
    AdapterSource,
    Chunk,
    FinishReason,
    Request,
    TokenLogprob,
)

# The ranks that vLLM makes room for (vllm.config.lora.MaxLoRARanks).
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Adapters that vLLM keeps in host memory; engine.vllm.max_cpu_loras changes it.
_HOST_ADAPTERS = 128
_REASONS: Mapping[str, FinishReason] = {"length": "length", "abort": "cancelled", "error": "error"}


@dataclass(frozen=True)
class Lora:
    """An adapter version as vLLM knows it."""

    number: int
    source: AdapterSource
    nbytes: int

    @property
    def name(self) -> str:
        return f"{self.source.ref}#{self.number}"


class VllmBackend(Protocol):
    """The interface that is used of vLLM, on one event loop."""

    @property
    def failure(self) -> BaseException | None:
        """Return why it has stopped for good."""

    def generate(self, request: Request, lora: Lora | None) -> AsyncGenerator[Any, None]:
        """Yield vLLM's `RequestOutput`s, each with what is new; closing it ends the request."""

    async def add(self, lora: Lora) -> None:
        """Loads its weights, where they aren't there; raises AdapterError for that adapter."""

    async def remove(self, lora: Lora) -> None:
        """Lets its weights go."""

    def close(self) -> None: ...


class Vllm:
    """vLLM itself: the only place that imports it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        require_vllm()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except TypeError as error:
            raise ConfigError(
                f"engine.vllm: vLLM does not take these arguments ({error}); "
                "see the documentation of its AsyncEngineArgs"
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(
                f"vLLM can't serve '{arguments['model']}' ({error}); "
                "use engine.type=transformers, or other settings under engine.vllm"
            ) from error

    @property
    def failure(self) -> BaseException | None:
        failure: BaseException | None = self._llm.dead_error if self._llm.errored else None
        return failure

    def generate(self, request: Request, lora: Lora | None) -> AsyncGenerator[Any, None]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        stream: AsyncGenerator[Any, None] = self._llm.generate(
            TokensPrompt(prompt_token_ids=list(request.prompt_ids)),
            SamplingParams(**sampling_arguments(request), output_kind=RequestOutputKind.DELTA),
            request.request_id,
            lora_request=None if lora is None else _lora_request(lora),
        )
        return stream

    async def add(self, lora: Lora) -> None:
        try:
            await self._llm.add_lora(_lora_request(lora))
        except Exception as error:
            if self._llm.errored:
                raise
            raise AdapterError(
                f"adapter '{lora.source.ref}': vLLM can't load it ({error}); "
                "serve it with engine.type=transformers"
            ) from error

    async def remove(self, lora: Lora) -> None:
        await self._llm.remove_lora(lora.number)

    def close(self) -> None:
        self._llm.shutdown()


def _lora_request(lora: Lora) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora.name, lora.number, str(lora.source.path))


def vllm_arguments(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """Return vLLM's own names for the settings; raises ConfigError for what it has no way to do."""
    rank = next((rank for rank in _RANKS if rank >= config.max_rank), None)
    if rank is None:
        raise ConfigError(
            f"engine.max_rank={config.max_rank}: vLLM serves ranks up to {_RANKS[-1]}; "
            "lower it, or use engine.type=transformers"
        )
    return {
        "model": locate(model),
        "revision": model.revision,
        "dtype": model.dtype,
        "quantization": "bitsandbytes" if config.quantization_bit else None,
        "max_model_len": config.max_length,
        "max_num_seqs": config.max_rows,
        "max_num_batched_tokens": config.prefill_chunk + config.max_rows,
        "enable_lora": True,
        "max_loras": config.slots,
        "max_lora_rank": rank,
        "max_cpu_loras": max(config.slots, _HOST_ADAPTERS),
        "disable_log_stats": True,
        **config.vllm,
    }


def as_vllm_stops(
    request: Request,
    end_token_ids: tuple[int, ...],
    special: Mapping[str, int],
    vocabulary: int,
) -> Request:
    """Return the request with all that ends its answer written so that vLLM sees it.

    `end_token_ids` are the base's; `special` is the id of each token that no text shows. vLLM looks
    for stop strings in what is shown: one that is such a token becomes its id. Tokens from
    `vocabulary` on, which a tokenizer may have and its model can't give, are left out, as vLLM
    refuses them. Raises RequestError for a stop string that has a special token within other text.
    """
    params = request.params
    for stop in params.stop:
        if stop not in special and (named := next((t for t in special if t in stop), None)):
            raise RequestError(
                f"stop {stop!r} has the special token {named!r} within other text, and vLLM looks "
                "for stop strings in text without those; give the token alone, or another stop"
            )

    def known(token_ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(token for token in token_ids if token < vocabulary)

    met = tuple(special[stop] for stop in params.stop if stop in special)
    return replace(
        request,
        params=replace(
            params,
            stop=tuple(stop for stop in params.stop if stop not in special),
            stop_token_ids=known(params.stop_token_ids + met),
        ),
        ends=Ends(known(request.ends.token_ids + end_token_ids), request.ends.texts),
    )


def sampling_arguments(request: Request) -> dict[str, Any]:
    """Return vLLM's SamplingParams for a request; rayfin's have the same names."""
    params = request.params
    names = (
        "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty "
        "frequency_penalty ignore_eos seed logprobs"
    )
    return {name: getattr(params, name) for name in names.split()} | {
        "stop": list(request.end_texts),
        "stop_token_ids": list(request.end_token_ids),
    }


def as_chunk(output: Any, logprobs: int | None) -> Chunk:
    """Return what a vLLM `CompletionOutput` brings; `logprobs` is how many likeliest tokens to
    name.
    """
    reason: FinishReason | None = None
    if output.finish_reason is not None:
        reason = _REASONS.get(output.finish_reason, "stop")
    written = []
    if logprobs is not None and output.logprobs:
        for token, known in zip(output.token_ids, output.logprobs, strict=True):
            # The token that was drawn is among them, and may be none of the likeliest.
            ranked = sorted(known.items(), key=lambda item: item[1].rank)[:logprobs]
            top = tuple((other, one.logprob) for other, one in ranked)
            written.append(TokenLogprob(token, known[token].logprob, top))
    why = EngineFailed("vLLM failed at this request") if reason == "error" else None
    return Chunk(output.text, tuple(output.token_ids), tuple(written), reason, why)


def check_lora_type(settings: AdapterSettings) -> None:
    """Raises AdapterError where vLLM does not serve an adapter's type."""
    peft_type = settings.text("peft_type")
    if peft_type != "LORA" or settings.flag("use_dora"):
        served = ", ".join(
            method.title
            for method in METHODS.values()
            if "vllm" in method.engines and not method.changes_base
        )
        raise settings.error(
            f"it is of type {'DORA' if peft_type == 'LORA' else shown(peft_type)}, and vLLM serves "
            f"{served}; serve it with engine.type=transformers"
        )


def check_lora(
    source: AdapterSource,
    base: Base,
    linears: Mapping[str, tuple[int, int]],
    max_rank: int,
    told: Mapping[str, Any] | None = None,
) -> int:
    """Return the bytes of an adapter that vLLM answers with exactly; raises AdapterError for any
    other.

    `base` and `linears` are as in BaseLayout; `told` goes before rayfin.json.

    vLLM does not look at what it doesn't know in adapter_config.json, so this does.
    """
    settings, metadata = read_settings(source)
    check_lora_type(settings)
    check_base(settings, metadata if told is None else told, base)
    settings.expect("task_type", None, "CAUSAL_LM")
    settings.expect("bias", None, "none")
    settings.expect("init_lora_weights", *PLAIN_INITS)
    # Of patterns vLLM knows nothing: one rank and one alpha for all layers.
    settings.expect_nothing_else((LORA_SETTINGS - {"rank_pattern"}) | {"use_rslora"})
    rank = settings.integer("r", 1, MAX_RANK)
    check_rank(settings, rank, max_rank)
    settings.number("lora_alpha")
    with AdapterWeights(source) as weights:
        suffixes = {".lora_A.weight": "A", ".lora_B.weight": "B"}
        for module, parts in modules_of(weights, suffixes, linears).items():
            in_features, out_features = linears[module]
            weights.check({parts["A"]: (rank, in_features), parts["B"]: (out_features, rank)})
        return sum(weights.read(name).nbytes for name in weights.names)
