"""quire.internal.v1.DiscoveryService: what gateways learn of models, groups and the scheduler."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import grpc

from quire.cluster.controller.groups import Group, GroupState
from quire.common.config import ModelPlan
from quire.common.model_folder import TOKENIZER_FILES
from quire.internal.v1 import discovery_pb2, discovery_pb2_grpc
from quire.v1 import cluster_pb2, inference_pb2

# Well below gRPC's 4 MiB bound on a message.
FILE_CHUNK_BYTES: Final = 1 << 20

_STATES: Final = {
    GroupState.STARTING: cluster_pb2.GROUP_STATE_STARTING,
    GroupState.READY: cluster_pb2.GROUP_STATE_READY,
    GroupState.DRAINING: cluster_pb2.GROUP_STATE_DRAINING,
    GroupState.STOPPED: cluster_pb2.GROUP_STATE_STOPPED,
}
# What requests that set nothing take from a model's generation_config.json.
_SAMPLING_DEFAULTS: Final[Mapping[str, type]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
}


def server_credentials(certificates: dict[str, str]) -> grpc.ServerCredentials:
    """For who answers: only those who hold the client's certificate get through."""
    pair = certificates["server_key"].encode(), certificates["server_certificate"].encode()
    return grpc.ssl_server_credentials([pair], certificates["client_certificate"].encode(), require_client_auth=True)


class ControllerView(Protocol):
    """What discovery needs of the controller."""

    def routing_table(self) -> discovery_pb2.WatchResponse: ...
    async def wait_for_change(self, version: int) -> None: ...
    def file(self, sha256: str) -> Path | None: ...


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A file that gateways fetch."""

    name: str
    path: Path
    sha256: str
    size_bytes: int


def tokenizer_files(plan: ModelPlan) -> list[TokenizerFile]:
    """The files of a model's folder that a gateway needs; those that are there."""
    files = []
    for name in TOKENIZER_FILES:
        path = plan.folder.path / name
        if path.is_file():
            contents = path.read_bytes()
            files.append(TokenizerFile(name, path, hashlib.sha256(contents).hexdigest(), len(contents)))
    return files


def served_model(plan: ModelPlan, files: list[TokenizerFile], *, max_request_tokens: int) -> discovery_pb2.ServedModel:
    """A model as gateways are told of it. max_request_tokens is 0 while no group is ready."""
    folder = plan.folder
    sampling = inference_pb2.SamplingParams()
    for name, kind in _SAMPLING_DEFAULTS.items():
        if folder.generation.get(name) is not None:
            setattr(sampling, name, kind(folder.generation[name]))
    if folder.generation.get("do_sample") is False:
        sampling.temperature = 0.0
    return discovery_pb2.ServedModel(
        model=inference_pb2.Model(
            name=plan.name,
            default=True,
            model_type=folder.model_type,
            max_model_len=plan.max_model_len,
            vocab_size=folder.vocab_size,
            chat=folder.has_chat_template,
            default_sampling=sampling,
            eos_token_ids=folder.eos_token_ids,
            block_size=plan.block_size,
        ),
        files=[discovery_pb2.ModelFile(name=file.name, sha256=file.sha256, size_bytes=file.size_bytes) for file in files],
        logits_size=folder.vocab_size,
        max_request_tokens=max_request_tokens,
    )


def group_message(group: Group) -> cluster_pb2.Group:
    """A group without the gauges that only the scheduler knows."""
    return cluster_pb2.Group(
        group_id=group.group_id,
        model=group.model,
        state=_STATES[group.state],
        term=group.term,
        tensor_parallel_size=group.tensor_parallel_size,
        restart_count=group.num_restarts,
        detail=group.detail,
        ranks=[cluster_pb2.Rank(rank=r.rank, device=r.device, pid=r.pid, host=r.host) for r in group.ranks],
    )


class Discovery(discovery_pb2_grpc.DiscoveryServiceServicer):
    """quire.internal.v1.DiscoveryService."""

    def __init__(self, controller: ControllerView) -> None:
        self._controller = controller

    async def Watch(self, request: discovery_pb2.WatchRequest, context: Any) -> AsyncIterator[discovery_pb2.WatchResponse]:
        while True:
            table = self._controller.routing_table()
            yield table
            await self._controller.wait_for_change(table.version)

    async def FetchFile(self, request: discovery_pb2.FetchFileRequest, context: Any) -> AsyncIterator[discovery_pb2.FetchFileResponse]:
        path = self._controller.file(request.sha256)
        if path is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no model has a file with this hash")
            return
        with path.open("rb") as file:
            while chunk := file.read(FILE_CHUNK_BYTES):
                yield discovery_pb2.FetchFileResponse(chunk=chunk)
