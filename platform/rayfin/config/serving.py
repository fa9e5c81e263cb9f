"""The settings of `rayfin serve`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayfin.config.schema import ModelConfig
from rayfin.section import Section

MAX_RANK = 1024
"""The highest rank of an adapter that an engine serves."""

_SQLITE = "sqlite:///"

ON_GPU: Mapping[str, Mapping[str, int]] = {
    # Every row has its cache whether it is used or not: more of them would take a GPU's memory.
    "transformers": {"max_rows": 32, "prefill_chunk": 1024, "max_queue": 256},
    # Its API's own defaults for most GPUs are 256 rows and 2048 tokens a step; rows share a cache.
    "vllm": {"max_rows": 256, "max_length": 8192, "prefill_chunk": 2048, "max_queue": 1024},
}
"""The defaults of each engine.type on a GPU that differ from those on the CPU."""

_GPU_MEMORY = 0.9
"""The share of a GPU's memory that vLLM takes by its own default."""

_IN_OTHER_WORDS = {
    "max_model_len": "max_length",
    "max_num_seqs": "max_rows",
    "max_loras": "slots",
    "max_lora_rank": "max_rank",
}
"""The settings of `engine` that take the place of vLLM's arguments."""


class EngineConfig(Section):
    """One replica's engine: how much it holds at a time."""

    type: Literal["transformers", "vllm"] = "transformers"
    """rayfin's own engine (every method, CPU and GPU), or vLLM (rayfin[vllm]): LoRA, on GPUs."""
    quantization_bit: Literal[4, 8] | None = None
    """Load the base model in 4-bit NF4 or 8-bit (bitsandbytes)."""
    weights: Literal["auto", "int8"] = "auto"
    """int8: linear layers on CPU over 8-bit weights, for float32 models and with a C compiler;
    faster, and answers may differ in a word."""
    max_rows: int = Field(16, ge=1, le=1024)
    """Sequences that decode at the same time; by default 32 on a GPU, and 256 in vLLM on one."""
    max_length: int = Field(2048, ge=16)
    """Tokens of a prompt and its answer together, virtual tokens included; by default no more than
    the model's positions, and 8192 in vLLM on a GPU."""
    prefill_chunk: int = Field(256, ge=8)
    """Prompt tokens that one step takes in beside the decoding rows; by default 1024 on a GPU, and
    2048 in vLLM on one."""
    slots: int = Field(8, ge=1, le=1024)
    """Adapters ready to decode at the same time."""
    max_rank: int = Field(64, ge=1, le=MAX_RANK)
    """The largest rank of a low-rank adapter; memory of a slot grows with it."""
    host_cache_mb: int = Field(2048, ge=0)
    """Memory for adapters that wait outside the slots; vLLM counts adapters instead."""
    tables_mb: int = Field(4096, ge=0)
    """Memory for the output heads and embeddings that all adapters in the slots bring of their own
    (modules_to_save); an adapter with more is refused. Of engine.type=transformers."""
    load_seconds: float = Field(60.0, gt=0)
    """Time that a request waits for adapters to be read from their storage, its own and those
    before it; then it gets 503."""
    step_seconds: float = Field(300.0, gt=0)
    """Time for one step of all rows; an engine that takes longer hangs, and is replaced. Of vLLM it
    is the time in which it sends nothing at all, though it has requests."""
    max_queue: int = Field(128, ge=1)
    """Requests that may wait; more are refused with 429. By default 256 on a GPU, and 1024 in vLLM
    on one."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """More of vLLM's engine arguments, by vLLM's names: {gpu_memory_utilization: 0.4, …}."""

    @model_validator(mode="after")
    def _of_one_engine(self) -> EngineConfig:
        if self.type == "transformers" and self.vllm:
            raise ValueError("vllm is for engine.type=vllm; set that, or leave it out")
        if self.weights == "int8" and self.quantization_bit is not None:
            raise ValueError(
                f"weights=int8 makes its own weights of full ones, and quantization_bit="
                f"{self.quantization_bit} leaves none; set one of them"
            )
        if self.type == "vllm" and self.weights != "auto":
            raise ValueError(
                f"weights={self.weights} is of engine.type=transformers; set that, or for vLLM a "
                "quantised model by model.name"
            )
        if self.type == "vllm" and self.quantization_bit == 8:
            raise ValueError("vLLM does not load 8-bit weights; use engine.quantization_bit=4")
        for theirs, ours in _IN_OTHER_WORDS.items():
            if theirs in self.vllm:
                raise ValueError(f"vllm.{theirs} is engine.{ours} here; set that in its place")
        return self

    def fitted(self, gpus: float, positions: int | None) -> EngineConfig:
        """Return a copy in which settings that were not given have the defaults of the device.

        `gpus` is the number of GPUs of one engine, 0 for the CPU. `positions` is the longest
        sequence of the model in tokens, None if it is unknown.
        """
        defaults: dict[str, Any] = dict(ON_GPU[self.type]) if gpus else {}
        if positions is not None:
            longest = defaults.get("max_length", self.max_length)
            defaults["max_length"] = max(16, min(longest, positions))
        fitted = {k: v for k, v in defaults.items() if k not in self.model_fields_set}
        if self.type == "vllm" and 0 < gpus < 1:
            memory = {"gpu_memory_utilization": round(_GPU_MEMORY * gpus, 2)}
            fitted["vllm"] = memory | self.vllm
        return self.model_copy(update=fitted)

    @property
    def gpus(self) -> int:
        """The number of GPUs over which one engine is spread, if it runs on GPUs."""
        parts = ("tensor_parallel_size", "pipeline_parallel_size")
        sizes = [self.vllm.get(name, 1) for name in parts]
        return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


class ApiKey(Section):
    """One API key, and what it may do."""

    key: str = Field(min_length=1, repr=False)
    """What clients send as `Authorization: Bearer KEY`."""
    adapters: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Adapters (all their versions), and the base model by its name, that it may use; null: all."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Requests that each replica takes from it in a minute, so many of them at once; null: any."""
    max_concurrent_requests: int | None = Field(None, ge=1)
    """Requests that each replica answers for it at a time; more are refused with 429; null: any."""


class ApiConfig(Section):
    """The HTTP API: who may ask, for how much, and what is written down."""

    max_body_bytes: int = Field(2 * 2**20, ge=1024)
    """Bytes of one request's body; more are refused with 413 while they come in."""
    body_seconds: float = Field(30.0, gt=0)
    """Time in which a request's head, and then its body, must have come in; else it gets 408."""
    write_seconds: float = Field(60.0, gt=0)
    """Time for a client to take what is ready of its answer; then its connection is closed."""
    max_client_uploads: int = Field(256, ge=1)
    """Bodies that may be coming in from one address; for one more the oldest ends with 429."""
    max_n: int = Field(16, ge=1)
    """Answers that one request may ask for: `n` times its prompts."""
    template_seconds: float = Field(1.0, gt=0)
    """Processor time for one rendering of an adapter's own chat template."""
    api_keys: tuple[ApiKey, ...] = ()
    """Keys of which all but /health needs one: [{key: KEY, adapters: [NAME],
    requests_per_minute: 60, max_concurrent_requests: 4}], of which only `key` has to be there.
    None: the API is open to all who reach it."""
    admin_token: str | None = Field(None, min_length=1, repr=False)
    """What loading and unloading adapters over HTTP takes as its bearer token; null: it is off."""
    request_log: str | None = Field(None, min_length=1)
    """File that gets a line of JSON for each request; null: none is written."""
    request_log_text: bool = False
    """Write prompts and answers into it too, beside counts and times."""
    max_adapter_labels: int = Field(100, ge=0)
    """Adapters that have their own figures in /metrics; later ones are counted as `other`."""

    @model_validator(mode="after")
    def _keys_differ(self) -> ApiConfig:
        keys = [entry.key for entry in self.api_keys]
        if len(set(keys)) < len(keys):
            raise ValueError("api_keys has the same key twice; give each its own, or merge them")
        if self.admin_token in keys:
            raise ValueError("admin_token is also one of api_keys; give it a value of its own")
        return self


class ReplicaConfig(Section):
    """Where the deployment listens, and how many replicas answer."""

    host: str = Field("127.0.0.1", min_length=1)
    """Address that the API listens on; 0.0.0.0 is reachable from other machines."""
    port: int = Field(8000, ge=1, le=65535)
    """Port of the API."""
    served_model_name: Annotated[str, Field(pattern=r"^[^\s\x00-\x1f\x7f]{1,256}$")] | None = None
    """What clients call the base model; null: its name, of a directory the directory's."""
    replicas: int = Field(1, ge=1, le=1000)
    """Engines, each a process with the whole base model; the least, where max_replicas is set."""
    max_replicas: int | None = Field(None, ge=1, le=1000)
    """Add replicas up to this while there is more to do, and take them away after; null: never."""
    api_replicas: int = Field(1, ge=1, le=100)
    """Processes that speak HTTP in front of the engines."""
    cpus: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """CPUs of one engine, which set its threads; auto is an even share of the cluster's."""
    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs of one engine (0.5: two share one; 0: the CPU). auto is one, or as many as engine.vllm
    asks for, and none on a cluster without any."""
    drain_seconds: float = Field(30.0, ge=0)
    """Time in which a replica that is to stop ends the requests that it works on."""
    health_check_seconds: float = Field(2.0, gt=0)
    """Time between looks at a replica; one that died or hangs is replaced."""

    @model_validator(mode="after")
    def _grows(self) -> ReplicaConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is less than replicas ({self.replicas}); "
                "raise it, or set it to null"
            )
        if self.gpus != "auto" and self.gpus > 1 and self.gpus % 1:
            raise ValueError(
                f"gpus={self.gpus:g}: Ray gives parts of one GPU, or whole ones; use a whole "
                "number, or 1 or less"
            )
        return self

    @property
    def most_replicas(self) -> int:
        """The most engines that run at a time."""
        return self.max_replicas or self.replicas


class ServeConfig(Section):
    """A deployment: one base model, and the adapters of one registry."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()
    deployment: ReplicaConfig = ReplicaConfig()
    storage: str = Field("./runs", min_length=1)
    """Directory (local or NFS) whose registry of adapters is served."""
    history: str | None = Field(None, repr=False)
    """URL of the history that serving figures go back to; null is the SQLite file under storage."""

    @model_validator(mode="after")
    def _precision_is_served(self) -> ServeConfig:
        if self.model.dtype == "bf16-mixed":
            raise ValueError(
                "model.dtype=bf16-mixed is for training; use auto, float32 or bfloat16 to serve"
            )
        return self

    @model_validator(mode="after")
    def _attention_is_its_own(self) -> ServeConfig:
        if (given := self.model.attn_implementation) != "auto":
            raise ValueError(
                f"model.attn_implementation={given} is for training: the engine computes attention "
                "itself; leave it out"
            )
        return self

    @property
    def served_name(self) -> str:
        """The name of the base model for clients, which is never a path on this machine."""
        return self.deployment.served_model_name or _public_name(self.model.name)

    def named(self) -> ServeConfig:
        """Return a copy with the served name set, as other machines lack the model's directory."""
        told = self.deployment.model_copy(update={"served_model_name": self.served_name})
        return self.model_copy(update={"deployment": told})

    def anchored(self, root: Path) -> ServeConfig:
        """Return a copy with absolute paths, relative ones starting from `root`.

        Replicas have working directories of their own.
        """

        def under(path: str) -> str:
            return path if "://" in path else str(root / Path(path).expanduser())

        paths: dict[str, Any] = {"storage": under(self.storage)}
        if (log := self.api.request_log) is not None:
            paths["api"] = self.api.model_copy(update={"request_log": under(log)})
        url = self.history or ""
        file = url.removeprefix(_SQLITE)
        # A URL that names no file is refused when it is opened.
        if file != url and file not in ("", ":memory:"):
            paths["history"] = _SQLITE + under(file)
        return self.model_copy(update=paths)


def _public_name(model: str) -> str:
    """Return a model's name: that of a directory, or the hub id of a downloaded snapshot.

    A version in the registry, `support/3`, has the name that it was published under.
    """
    path = Path(model).expanduser()
    if not (path.is_dir() or path.is_absolute() or model.startswith((".", "~"))):
        return model
    path = path.resolve()
    folder = path.parent.parent.name
    if path.parent.name == "snapshots" and folder.startswith("models--"):
        return folder.removeprefix("models--").replace("--", "/")
    name = path.parent.name if path.name.isdecimal() else path.name
    return "-".join(name.split()) or model
