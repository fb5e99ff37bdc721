"""`mer cluster` on Ray: starts shards and engines, tells how they are, ends them."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress
from typing import Any, Final

import ray
from attrs import frozen
from ray import serve

from mer.config import EngineConfig, parse_address
from mer.deploy.plan import NAME, Plan
from mer.deploy.ray_engine import EngineReplica, shard_names
from mer.deploy.ray_front import FRONT
from mer.deploy.ray_router import AffinityRouter
from mer.deploy.ray_scaling import QueueTimePolicy
from mer.deploy.ray_shard import ShardActor
from mer.errors import ConfigError, MerError

_GROUP: Final = f"{NAME}-shards"
# Seconds that placing may take, and what only tells something.
_PLACING: Final = 60.0
_SOON: Final = 10.0
# Seconds from when engines are there until Serve listens on every node.
_LISTENING: Final = 120.0
# Seconds for which requests have to wait too long, or hardly, before an engine is added or taken away.
_MORE_AFTER: Final = 60.0
_LESS_AFTER: Final = 900.0


class RayError(MerError):
    """What Ray could not do."""


@frozen(kw_only=True)
class State:
    """What there is. Each entry is what the actor tells of itself; {} of one that does not answer."""

    nodes: int
    shards: list[dict[str, Any]]
    status: str
    """Of the application, in Ray Serve's words; '': there is none."""
    engines: list[dict[str, Any]]


def connect(address: str) -> None:
    """address: of a Ray that is running; 'auto': the one that this machine belongs to. Raises ConfigError."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        if address != "auto" and "://" not in address:  # Ray itself tries for minutes
            socket.create_connection(parse_address(address), _SOON).close()
        ray.init(address, namespace=NAME, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray answers at {address!r} ({error}); `ray start --head` starts one on this machine"
        ) from None


def up(plan: Plan) -> None:
    """Start all of it, and wait until requests can come. Raises ConfigError, RayError."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    plan.check_nodes(len(nodes))
    plan.check_room(ray.cluster_resources())
    if _serve_runs():
        what = "the cluster is up already; `mer cluster down` ends it"
        if not _status():
            what = "Ray Serve runs already, with an address of its own; `serve shutdown` ends it"
        raise ConfigError(what)
    application = _application(plan)  # what can't be is said before anything is started
    _check_ports(plan, nodes)
    try:
        if plan.shards:
            _start_shards(plan)
        _serve(plan, application)
    except BaseException:  # also when somebody does not want to wait any longer
        down()
        serve.shutdown()
        raise


def state() -> State:
    """What there is now."""
    shards = []
    for entry in sorted(ray.util.list_named_actors(), key=lambda name: (len(name), name)):
        if entry.startswith(f"{NAME}-shard-"):
            shards.append({"name": entry} | _ask(entry))
    status = _status()
    engines: list[dict[str, Any]] = []
    if status:
        handle = serve.get_deployment_handle("engine", NAME)
        try:
            engines = list(handle.broadcast("state").results(timeout_s=_SOON))
        except (TimeoutError, ray.exceptions.RayError, RuntimeError) as error:
            raise RayError(f"the engines do not say how they are: {error}") from None
    return State(
        nodes=sum(node["Alive"] for node in ray.nodes()),
        shards=shards,
        status=status,
        engines=sorted(engines, key=lambda each: str(each["replica"])),
    )


def down() -> bool:
    """End what there is; whether there was anything. Ray itself goes on, and Serve if it has more to do."""
    there = bool(_status())
    if there:
        serve.delete(NAME)
        if not serve.status().applications:
            serve.shutdown()
    for name in ray.util.list_named_actors():
        if name.startswith(f"{NAME}-shard-"):
            ray.kill(ray.get_actor(name, namespace=NAME))
            there = True
    try:
        group = ray.util.get_placement_group(_GROUP)
    except ValueError:
        return there
    ray.util.remove_placement_group(group)
    return True


def _check_ports(plan: Plan, nodes: list[dict[str, Any]]) -> None:
    """Raises ConfigError where Serve could not listen: it would try for ever, and not say why."""
    look = ray.remote(num_cpus=0)(taken)
    on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    for option, host, port in (
        ("--port", plan.host, plan.port),
        ("--grpc-port", "0.0.0.0", plan.grpc_port),
    ):
        if port is None:
            continue
        asked = [
            look.options(scheduling_strategy=on(node["NodeID"], soft=False)).remote(host, port)
            for node in nodes
        ]
        for node, why in zip(nodes, ray.get(asked), strict=True):
            if why:
                raise ConfigError(
                    f"port {port} of the node {node['NodeManagerAddress']} can not be listened at ({why}); "
                    f"{option} names another one"
                )


def taken(host: str, port: int) -> str:
    """Why nothing can listen there, on the machine that runs this; '' if it can."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)


def _serve(plan: Plan, application: Any) -> None:
    """Until requests can come."""
    grpc_options = {
        "port": plan.grpc_port,
        "grpc_servicer_functions": ["mer.v1.inference_pb2_grpc.add_InferenceServicer_to_server"],
    }
    tls = {"ssl_certfile": plan.tls_cert, "ssl_keyfile": plan.tls_key} if plan.tls_cert else {}
    http = {"host": plan.host, "port": plan.port, **{name: str(file) for name, file in tls.items()}}
    try:
        with suppress(TimeoutError):  # after a minute, as on a machine with much else to do
            serve.start(
                proxy_location="EveryNode",
                http_options=http,
                grpc_options=grpc_options if plan.grpc_port is not None else None,
            )
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise RayError(f"Ray Serve could not be started: {_reason(error)}") from None
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError:
        raise RayError(f"engines could not be started: {_trouble()}") from None
    end = time.monotonic() + _LISTENING
    while late := [node for node, each in serve.status().proxies.items() if each == "STARTING"]:
        if time.monotonic() > end:
            raise RayError(f"Ray Serve does not listen on {len(late)} nodes, such as {late[0]}")
        time.sleep(0.1)


def _start_shards(plan: Plan) -> None:
    """Spread over the nodes; Ray starts each anew when its process or node ends."""
    each = {"CPU": plan.shard_cpus, "memory": plan.shard_ram}
    group = ray.util.placement_group(
        [each] * plan.shards, strategy="SPREAD", name=_GROUP, lifetime="detached"
    )
    if not group.wait(_PLACING):
        raise RayError(
            f"Ray has no room for {plan.shards} shards of {plan.shard_cpus} CPUs and {plan.shard_ram >> 20} "
            "MiB each; give fewer, or smaller ones, or add nodes (ray status shows what there is)"
        )
    made = ray.remote(ShardActor)
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    actors = [
        made.options(
            name=name,
            lifetime="detached",
            num_cpus=plan.shard_cpus,
            memory=plan.shard_ram,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=4,
            scheduling_strategy=strategy(group, placement_group_bundle_index=number),
        ).remote(plan, number)
        for number, name in enumerate(shard_names(plan))
    ]
    try:
        ray.get([actor.address.remote() for actor in actors])
    except ray.exceptions.RayError as error:
        raise RayError(f"a shard could not be started: {_reason(error)}") from None


def _application(plan: Plan) -> Any:
    config = EngineConfig(**plan.engine)
    most = config.max_running
    each = {"CPU": plan.cpus, "memory": plan.ram}
    options: dict[str, Any] = {
        "name": "engine",
        "ray_actor_options": {"num_cpus": plan.cpus, "memory": plan.ram},
        "placement_group_bundles": [each],
        # The engine has a queue of its own, and says itself when that is full.
        "max_ongoing_requests": most + config.max_waiting,
        "request_router_config": serve.config.RequestRouterConfig(request_router_class=AffinityRouter),
        "graceful_shutdown_timeout_s": 30,
    }
    if plan.most_replicas > plan.replicas:
        options["autoscaling_config"] = serve.config.AutoscalingConfig(
            min_replicas=plan.replicas,
            max_replicas=plan.most_replicas,
            policy=serve.config.AutoscalingPolicy(
                policy_function=QueueTimePolicy,
                policy_kwargs={"target": plan.queue_seconds, "most": most},
            ),
            # A new engine has to load its model, and an old one has a warm cache.
            upscale_delay_s=_MORE_AFTER,
            downscale_delay_s=_LESS_AFTER,
        )
    else:
        options["num_replicas"] = plan.replicas
    engines = serve.deployment(**options)(EngineReplica)
    front = serve.deployment(name="front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)(
        FRONT
    )
    return front.bind(engines.bind(plan))


def _serve_runs() -> bool:
    """Without starting it, as whatever asks it something does."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"} in named


def _status() -> str:
    """Of the application; '': there is none."""
    if not _serve_runs():
        return ""
    found = serve.status().applications.get(NAME)
    return str(found.status.value) if found is not None else ""


def _trouble() -> str:
    """Why engines are not as they should be: the last line of what Serve says of each deployment."""
    found = serve.status().applications[NAME]
    said = [each.message.strip().splitlines() for each in found.deployments.values()]
    return "; ".join(lines[-1] for lines in said if lines) or str(found.message)


def _ask(actor: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(ray.get_actor(actor, namespace=NAME).state.remote(), timeout=_SOON)
    except (ValueError, ray.exceptions.RayError):  # it is being started anew
        return {}
    return found


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1]
