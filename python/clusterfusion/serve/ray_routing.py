"""Which replica computes a request: the one whose prefix cache knows its beginning."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

SESSION_HEADER = "x-session-id"


def affinity_of(headers: Mapping[str, str], body: bytes, prefix_length: int) -> str | None:
    """What requests share that should go to one replica.

    That is the header `x-session-id`, or else the field `user`, or else the beginning of the prompt
    or of the messages.

    Args:
        headers: The request's, by names in lower case.
        body: The request's, in JSON; what is not JSON has no affinity.
        prefix_length: Characters of the beginning that count, or a quarter as many token ids; 0
            for none.

    Returns:
        A digest; None for requests that any replica may compute.
    """
    session = headers.get(SESSION_HEADER)
    if session:
        return _digest("session", session)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    user = fields.get("user")
    if isinstance(user, str) and user:
        return _digest("user", user)
    beginning = _beginning(fields, prefix_length)
    return _digest("prefix", beginning) if beginning else None


def _beginning(fields: dict[str, Any], length: int) -> str:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several prompts
    if isinstance(prompt, str):
        return prompt[:length]
    if isinstance(prompt, list):
        count = -(-length // 4)
        return json.dumps(prompt[:count]) if prompt and count else ""
    messages = fields.get("messages")
    return json.dumps(messages)[:length] if messages else ""


def _digest(*parts: str) -> str:
    data = "\0".join(parts).encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Sends what has the same affinity to the same replica, unless that has too much to do.

    For each affinity the replicas have an order of their own (rendezvous hashing), the same in each
    process that routes: when a replica comes or goes, only what goes to it changes its place. A
    replica that has `max_imbalance` requests more than the least busy one is passed over. Requests
    without affinity go to the less busy of two.
    """

    def initialize_state(self, max_imbalance: int = 16) -> None:
        """Takes the router's options, from RequestRouterConfig.request_router_kwargs."""
        self._max_imbalance = max_imbalance

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas to try, best first; of those in one list Ray takes the least busy."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # wait when all of them are full
        affinity = pending_request.args[0].affinity
        if affinity is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

        def rank(replica: RunningReplica) -> bytes:
            key = f"{affinity} {replica.replica_id.unique_id}".encode()
            return hashlib.blake2b(key, digest_size=8).digest()

        def load(replica: RunningReplica) -> int:
            return self.replica_queue_len_cache.get(replica.replica_id) or 0

        most = min(map(load, candidate_replicas)) + self._max_imbalance
        ranked = sorted(candidate_replicas, key=rank)
        idle = [[replica] for replica in ranked if load(replica) < most]
        return [*idle, [replica for replica in ranked if load(replica) >= most]]
