"""A Ray of its own, for tests: `python ray_host.py FOLDER`, FOLDER for whatever Ray writes.

Its first line is where Ray listens. Then each line of its input is answered by what there is of the cluster,
as JSON ({} where Ray can not tell now); the line `metrics` by where Prometheus asks for what Ray's dashboard
shows. All of Ray ends with it, and it ends when its input does.
"""

from __future__ import annotations

import json
import sys

import attrs
import ray

from mer.deploy import ray_cluster
from mer.deploy.plan import NAME
from mer.errors import MerError


def main(folder: str) -> None:
    """Until the input ends."""
    ray.init(
        "local",
        namespace=NAME,
        num_cpus=8,
        num_gpus=0,
        _memory=8 << 30,
        object_store_memory=80 << 20,
        _plasma_directory=folder,  # /dev/shm may be small
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    for line in sys.stdin:
        if line == "metrics\n":
            (node,) = ray.nodes()
            print(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", flush=True)
            continue
        try:
            told = attrs.asdict(ray_cluster.state())
        except MerError:
            told = {}
        print(json.dumps(told), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
