"""The OpenAPI document is honest: generated requests get documented answers, and no 5xx."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from rayfin.adapters import Registry

# Rules between fields (`top_logprobs` needs `logprobs`) are not in the document.
NOT_PROMISED = {"positive_data_acceptance"}
MODELS = ("support", "support@1", "sales", "tiny", "tiny:sales")
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "say red"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "say red"}]},
    "/tokenize": {"prompt": "say red"},
}
EXAMPLES = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def short(tools: Any, tiny: str, shared_registry: Registry) -> Iterator[Any]:
    """A server whose answers are short, whatever max_tokens says, with keys and admin calls."""
    from rayfin.config.schema import ModelConfig
    from rayfin.config.serving import EngineConfig
    from rayfin.serving.engine.engine import Engine

    engine = Engine(ModelConfig(name=tiny), EngineConfig(max_length=64), use_gpu=False)
    engine.start()
    config = tools.ApiConfig.model_validate(
        {"admin_token": "root", "api_keys": [{"key": "user"}], "max_n": 4}
    )
    with tools.serving(engine, shared_registry, config) as server:
        yield server
    engine.close()


def test_generated_requests_get_what_the_document_says(short: Any) -> None:
    load_all_checks()
    checks = [check for check in CHECKS.get_all() if check.__name__ not in NOT_PROMISED]
    document = schemathesis.openapi.from_url(f"{short.url}/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) == 9

    def run(operation: Any, mode: GenerationMode) -> None:
        turn = iter(range(10**6))

        @EXAMPLES
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            # By chance no request would ever name a model that there is.
            number = next(turn)
            # Nor is any of a few sure to be answered: what is drawn depends on what was imported.
            if number == 0 and mode is GenerationMode.POSITIVE and operation.path in PLAIN:
                case.body = {"model": MODELS[0], **PLAIN[operation.path]}
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODELS[number % len(MODELS)]
                if operation.path.endswith("/completions"):
                    case.body.setdefault("stream", number % 2 == 0)
            headers = {"authorization": "Bearer user"}
            response = case.call(headers=headers, timeout=540)
            statuses[operation.path, response.status_code] += 1
            case.validate_response(response, checks=checks, headers=headers)

        check()

    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not (
                operation.body or operation.path_parameters
            ):
                continue  # there is nothing that could be wrong
            run(operation, mode)
    assert {status for _, status in statuses} >= {200, 400, 403, 404}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        assert statuses[path, 200] and statuses[path, 400], statuses


def test_the_document_names_every_field_and_what_it_does(short: Any) -> None:
    document = short.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"ChatBody", "CompletionBody", "TokenizeBody", "ErrorAnswer"} <= set(schemas)
    assert schemas["ChatBody"]["additionalProperties"] is False
    assert "engine.max_length" in schemas["ChatBody"]["properties"]["max_tokens"]["description"]
    secured = {
        path: bool(operation.get("security"))
        for path, item in document["paths"].items()
        for operation in item.values()
    }
    assert [path for path, needs in secured.items() if not needs] == ["/health"]


def test_admin_calls_are_documented_only_where_they_are_on(server: Any) -> None:
    document = server.http.get("/openapi.json").json()
    assert "/v1/load_lora_adapter" not in document["paths"]
    assert not any(
        operation.get("security")
        for item in document["paths"].values()
        for operation in item.values()
    )
